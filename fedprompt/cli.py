"""The command line. Exit codes: 0 done; 1 the run failed or was stopped; 2 bad input, told in one line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import click

from fedprompt import __version__
from fedprompt.commands import OneLine, guarded
from fedprompt.config.parsing import load
from fedprompt.errors import InputError, did_you_mean
from fedprompt.failure import told_in_one_line
from fedprompt.interrupts import terminated_as_interrupt, undisturbed
from fedprompt.programs import BENCHMARKS, PROGRAMS, STUDIES
from fedprompt.registry import TYPES
from fedprompt.terminal import follow, stoppable
from fedprompt.wording import counted


class _Commands(OneLine, click.Group):
    """The group of all commands."""


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedprompt")
@click.pass_context
def main(context: click.Context) -> None:
    """Simulate federated prompt tuning of a frozen Vision Transformer.

    Settings are a YAML file, dotted overrides such as `partition.alpha=0.1 local.lr=5e-4`, or both.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _command(function: Callable[..., None], name: str | None = None) -> Callable[..., None]:
    """Make a command of a function."""
    return main.command(name)(guarded(function))


def _named(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command have another name than its function, which would hide one of Python's."""
    return lambda function: _command(function, name)


def _split(arguments: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """Tell an optional configuration file from the overrides behind it."""
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise InputError(f"'{files[1]}': a second configuration file; allowed: one file, then key=value overrides")
    return (files[0] if files else None), [argument for argument in arguments if "=" in argument]


def _say(line: str) -> None:
    """Tell how far a command is."""
    click.echo(f"fedprompt: {line}", err=True)


def _output_option(help: str) -> Callable:
    return click.option("--output", type=click.Path(path_type=Path), help=help)


_CONFIG = click.argument("config", nargs=-1, metavar="[CONFIG.yaml] [key=value ...]")


@_command
@_CONFIG
@_output_option("Folder of the run; default: a new one below runs/.")
@click.option("--resume", is_flag=True, help="Continue the run in --output from its newest checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --output.")
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
def run(config: tuple[str, ...], output: Path | None, resume: bool, overwrite: bool, local: bool) -> None:
    """Run one experiment: without arguments PFPT on the embedded data and the pretrained backbone."""
    from fedprompt.runtime import run as running

    path, overrides = _split(config)
    if resume and output is None:
        raise InputError("--resume: needs --output DIR, the folder of the run to continue")
    if resume and overwrite:
        raise InputError("--resume: does not go with --overwrite; allowed: one of them")
    settings = None if resume else load(path, overrides)

    def go(output: Path) -> None:
        again = f"fedprompt run --resume --output {shlex.quote(str(output))}" + " --local" * local
        folder = (
            running.resumed_run(output, path, overrides, _say)
            if settings is None
            else running.new_run(output, settings, overwrite, path, _say)
        )
        with stoppable(again, output / "config.yaml"), undisturbed(folder) as (config, held):
            follow(config, output, local, held)

    if output is not None:
        go(output)
    elif settings is not None:
        running.in_free_folder(settings, go)


@_command
@_CONFIG
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0: a free one."
)
@click.option(
    "--runs", type=click.IntRange(1, 1000), default=1, show_default=True, help="Runs that get blackbox.budget."
)
def serve(config: tuple[str, ...], host: str, port: int, runs: int) -> None:
    """Serve the model of a black-box run over HTTP until Ctrl-C; runs elsewhere ask it with blackbox.address=...

    Beyond this machine all who ask need a token: what FEDPROMPT_TOKEN holds, or else one that is made and printed.
    """
    from fedprompt.runtime.serving import http_service

    path, overrides = _split(config)
    settings = load(path, overrides)
    said: list[str] = []  # nothing before it serves

    def say(line: str) -> None:
        said.append(line)
        click.echo(line)

    with terminated_as_interrupt(), told_in_one_line(None, settings.to_yaml()):
        try:
            http_service.serve(settings, http_service.opened(host, port), runs, say)
        except KeyboardInterrupt:
            if not said:
                raise


@_command
@_CONFIG
@_output_option("Folder for partition.csv and partition.png; default: print only.")
@click.option("--features", is_flag=True, help="Measure how far clients' features are apart, too.")
def partition(config: tuple[str, ...], output: Path | None, features: bool) -> None:
    """Show how the data falls among clients: the client × class table and measures of heterogeneity."""
    import shutil

    import pandas as pd

    from fedprompt.data import feature_distance, measures
    from fedprompt.runtime.build import build_data, frozen_features
    from fedprompt.tracking.partition_table import partition_lines

    path, overrides = _split(config)
    settings = load(path, overrides)
    data = build_data(settings)
    counts = data.class_counts()
    table = pd.DataFrame(counts, columns=list(data.class_names)).rename_axis("client")
    for note in data.notes:
        click.echo(f"fedprompt: {note}", err=True)
    click.echo("\n".join(partition_lines(counts, data.class_names, shutil.get_terminal_size((120, 24)).columns)))
    measured = measures(counts)
    if features:
        measured["feature_distance"] = feature_distance(
            frozen_features(settings, data.train.split)[data.train.indices], data.clients
        )
    for name, value in measured.items():
        click.echo(f"{name}: {value:.4g}")
    if output is not None:
        from fedprompt.runtime.folders.folders import check_free, mark
        from fedprompt.tracking.plots import partition_figure, save

        names = ("partition.csv", "partition.png")
        output.mkdir(parents=True, exist_ok=True)
        check_free(output, "partition", names)
        mark(output, "partition", names)
        table.to_csv(output / "partition.csv")
        save(partition_figure(counts, data.class_names), output / "partition.png")
        click.echo(f"written: {output / 'partition.csv'}, {output / 'partition.png'}")


def _list(type: str) -> None:
    from fedprompt import listings

    listings.show(listings.listing(type), indent=4 if type == "backbones" else None)


@_named("list")
@click.argument("type", metavar="TYPE")
def listed(type: str) -> None:
    """List what there is of a TYPE, that of other packages included."""
    words = sorted(word.replace("_", "-") for word in TYPES)
    if type not in words:
        raise InputError(f"list: unknown type '{type}'{did_you_mean(type, words)}; allowed: {', '.join(words)}")
    _list(type.replace("-", "_"))


listed.epilog = "\b\nTYPE:\n" + "\n".join(f"  {type.replace('_', '-')}" for type in sorted(TYPES))


@_command
def algorithms() -> None:
    """List the methods: what they are, where they are from, what they train and their settings."""
    _list("algorithms")


@_command
def datasets() -> None:
    """List the data sets, whether they are present here, and how to get them."""
    _list("datasets")


@_command
def backbones() -> None:
    """List pretrained backbones, whether their weights are present here, and how to get them."""
    _list("backbones")


@_command
@click.argument("arguments", nargs=-1, metavar="[SWEEP.yaml] [key=value ...]")
@_output_option("Folder of the sweep; default: a new one below runs/sweeps/.")
@click.option("--resume", is_flag=True, help="Run what is left of the sweep in --output.")
def sweep(arguments: tuple[str, ...], output: Path | None, resume: bool) -> None:
    """Run all trials of a sweep file on Ray Tune, each in a folder of its own; overrides go into its base."""
    path, overrides = _split(arguments)
    if resume and output is None:
        raise InputError("--resume: needs --output DIR, the folder of the sweep to continue")
    if path is None and not resume:
        raise InputError("SWEEP.yaml: missing; allowed: a sweep file, such as those in tune_configs/")
    from fedprompt.reports.verdict import verdict
    from fedprompt.sweeps import sweep as sweeping

    given = Path(path) if path else None
    plan = sweeping.resumed(output, given, overrides) if resume else sweeping.planned(given, overrides, output)
    again = f"fedprompt sweep --resume --output {shlex.quote(str(plan.output))}"
    with stoppable(again, plan.output / "sweep.yaml"), told_in_one_line(plan.output, plan.file.to_yaml()):
        outcomes = sweeping.run(plan, _say, lambda line: click.echo(f"fedprompt: {line}"))
    click.echo(outcomes.text())
    click.echo(f"\naccuracy in percent, mean ± deviation over seeds\n{verdict(plan.output)}\n")
    click.echo(f"written: {plan.output}/results.csv  (tensorboard --logdir {plan.output})")
    if failed := outcomes.of("failed"):
        for trial in failed:
            click.echo(f"fedprompt: {trial.name} failed: {outcomes.reason(trial)}", err=True)
        sys.exit(1)


@_command
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@_output_option("Folder for what comes out; default: personalize/ in RUN_DIR.")
@click.option("--resume", is_flag=True, help="Go on with the learning rates that are left in --output.")
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
def personalize(run_dir: Path, overrides: tuple[str, ...], output: Path | None, resume: bool, local: bool) -> None:
    """Let every client of a run go on tuning for itself: personalization against robustness, after every epoch.

    Settings are personalize.lr, epochs, optimizer, trains, pull, interpolation, averaging and clients.
    """
    from fedprompt.personalization import personalize as personalizing

    plan = personalizing.planned(run_dir, overrides, output, resume)
    click.echo(f"accuracy on the clients' own test data / on everybody's, from round {plan.checkpoint.round} on")
    more = f" --output {shlex.quote(str(output))}" * (output is not None) + " --local" * local
    again = f"fedprompt personalize {shlex.quote(str(run_dir))} --resume{more}"
    with stoppable(again, plan.output / personalizing.SETTINGS), told_in_one_line(plan.output, plan.text()):
        personalizing.run(plan, local, click.echo)
    click.echo(f"written: {plan.output}/personalize.csv, curve.csv, curve.png, result.json")


_ROUND = click.option(
    "--round", default="best", show_default=True, help="best (on validation), last, or a round's number."
)
_CLIENT = click.option("--client", type=int, help="The personal model of this client; default: the global model.")


def _round(text: str) -> int | str:
    return int(text) if text.isdecimal() and len(text) < 10 else text


@_command
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, metavar="FILE ...", type=click.Path(path_type=Path))
@_ROUND
@_CLIENT
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON per file instead of a table.")
def predict(run_dir: Path, files: tuple[Path, ...], round: str, client: int | None, as_json: bool) -> None:
    """Predict images, and folders of images, with a model of a run: label and probability of each."""
    from fedprompt.api.predicting import image_files, predictions
    from fedprompt.api.runs import load_run

    run, found = load_run(run_dir), image_files(files)
    refused: list[str] = []
    width = max(len(str(file)) for file in found)
    for one in predictions(run.model(_round(round), client), found, refused.append):
        click.echo(one.as_json() if as_json else f"{one.file:<{width}}  {one.probability:6.1%}  {one.label}")
    for line in refused:
        click.echo(f"fedprompt: {line}", err=True)
    if refused:
        sys.exit(2)


@_command
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the files.")
@_ROUND
@_CLIENT
def export(run_dir: Path, output: Path, round: str, client: int | None) -> None:
    """Write a model of a run as safetensors, configuration and model card, which load without fedprompt."""
    from fedprompt.api.runs import load_run

    model = load_run(run_dir).export(output, _round(round), client)
    click.echo(f"written: {output}/ (the model of round {model.round}; README.md tells what is in it)")


@_command
@click.argument("folders", nargs=-1, required=True, metavar="DIR ...", type=click.Path(path_type=Path))
@_output_option("Folder of the report; default: report/ in the first DIR.")
@click.option("--tsne", is_flag=True, help="Map PFPT's prompts by t-SNE instead of PCA, which may take minutes.")
def report(folders: tuple[Path, ...], output: Path | None, tsne: bool) -> None:
    """Compare finished runs: tables over settings, methods and seeds, tests and figures, of all runs below DIR."""
    from fedprompt.reports.report import write_report

    output = output or folders[0] / "report"
    with terminated_as_interrupt(), told_in_one_line(output, shlex.join(sys.argv)):
        count, left_out = write_report(folders, output, _say, tsne=tsne)
    for run in left_out:
        click.echo(f"left out: {run.folder}: {run.why}")
    click.echo(f"written: {output}/report.md, table.csv, table.tex and figures, of {counted(count, 'run')}")


@_command
@click.argument("name", metavar="NAME")
def bench(name: str) -> None:
    """Tell how a study or a benchmark is run: both are programs of the repository."""
    if name not in PROGRAMS:
        known = ", ".join(PROGRAMS)
        raise InputError(f"bench: unknown program '{name}'{did_you_mean(name, PROGRAMS)}; allowed: {known}")
    click.echo(PROGRAMS[name])
    click.echo("in the folder of the repository; --quick is a smaller version, --json FILE keeps the numbers", err=True)


bench.epilog = "\n\n".join(
    f"\b\n{kind}:\n" + "\n".join(f"  {name:<15}{about}" for name, about in programs.items())
    for kind, programs in (("Studies", STUDIES), ("Benchmarks", BENCHMARKS))
)
