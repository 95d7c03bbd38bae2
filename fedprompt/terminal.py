"""What a run shows on the terminal while it goes on, and how it ends there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedprompt import interrupts, outlets
from fedprompt.commands import INTERRUPTED, fail
from fedprompt.config.schema import Config
from fedprompt.failure import told_in_one_line
from fedprompt.wording import counted

if TYPE_CHECKING:
    from fedprompt.runtime.folders.locks import Held


@contextlib.contextmanager
def stoppable(resume: str, saved: Path) -> Iterator[None]:
    """Let signals interrupt what is inside, and say then how it continues: with ``resume``, once ``saved`` is there.

    Where standard output goes away it goes on; its results are in files.
    """
    outlets.keep_going()
    try:
        with interrupts.terminated_as_interrupt():
            yield
    except KeyboardInterrupt:
        fail(f"fedprompt: stopped; continue with: {resume}" if saved.exists() else INTERRUPTED, 1)


def follow(config: Config, output: Path, local: bool, held: Held) -> None:
    """Show a run's records as they come, and what it came to; raises what it failed of, in one line.

    ``held``: the folders that it writes to.
    """
    from fedprompt.api.running import raise_failure, records
    from fedprompt.tracking.progress import Progress

    progress = contextlib.closing(Progress(config.federation.rounds))
    with (
        told_in_one_line(output, config.to_yaml()),
        progress as bar,
        contextlib.closing(records(config, output, local, bar.stage, held)) as said,
    ):
        for record in said:
            raise_failure(record)
            _show(record, bar)
            interrupts.check()
    _summary(record["result"], output)  # the last one


def _show(record: dict[str, Any], progress: Any) -> None:
    if "stage" in record:
        progress.stage(record["stage"])
    elif "note" in record:
        progress.note(f"fedprompt: {record['note']}")
    elif "round" in record:
        progress.update(record)


def _summary(result: dict[str, Any], output: Path) -> None:
    best, final, last = result["best"], result["final"], result["last10"]
    rounds = counted(result["rounds"], "round")
    click.echo(f"{result['algorithm']} on {result['dataset']}, {rounds}, seed {result['seed']}")
    evaluations = "evaluation" if last["evaluations"] == 1 else counted(last["evaluations"], "evaluation")
    click.echo(
        f"test accuracy: {best['accuracy']:.1%} at round {best['round']} (best on validation), {final['accuracy']:.1%} "
        f"at the end, {last['accuracy']:.1%} mean of the last {evaluations}"
    )
    if result["pool_size"]:
        first = counted(result["pool_size"]["first"], "prompt")
        click.echo(f"pool: {first} at the start, {result['pool_size']['last']} at the end")
    up, full = result["communication"]["up_bytes"], result["communication"]["full_model_bytes"]
    both = up + result["communication"]["down_bytes"]
    saved = f" ({1 - both / full:.2%} less than full fine-tuning)" if full else ""
    click.echo(f"sent: {both / 1e6:.1f} MB both ways{saved}; {result['seconds']['total']:.0f} s")
    click.echo(f"written: {output}/  (tensorboard --logdir {output.parent})")
