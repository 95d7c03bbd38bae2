"""What a run shows on the terminal while it goes on, and how it ends there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from fedprompt.config import Config
from fedprompt.errors import InputError, RunFailed


def fail(line: str, code: int) -> NoReturn:
    """End the process with one line on standard error."""
    click.echo(line, err=True)
    sys.exit(code)


def follow(config: Config, output: Path, local: bool) -> None:
    """Show a run's records as they come, and say how it ended."""
    from fedprompt.tracking.progress import Progress

    progress = contextlib.closing(Progress(config.federation.rounds))
    resume = f"fedprompt run --resume --output {output}" + (" --local" if local else "")
    try:
        with progress as bar, contextlib.closing(_records(config, output, local)) as records:
            for record in records:
                _show(record, bar)
    except KeyboardInterrupt:
        fail(f"fedprompt: stopped; continue with: {resume}", 1)
    except RunFailed as error:
        fail(f"fedprompt: {error}", 1)
    _summary(record["result"], output)  # the last one


def _records(config: Config, output: Path, local: bool) -> Iterator[dict[str, Any]]:
    if local:
        from fedprompt.runtime.run import run_in_process

        return run_in_process(config, output)
    from fedprompt.runtime.on_ray import run_on_ray

    return run_on_ray(config, output)


def _show(record: dict[str, Any], progress: Any) -> None:

    if "error" in record:
        raise (InputError if record["code"] == 2 else RunFailed)(record["error"])
    if "stopped" in record:
        raise KeyboardInterrupt
    if "note" in record:
        progress.note(f"fedprompt: {record['note']}")
    elif "round" in record:
        progress.update(record)
        for warning in record.get("warnings", ()):
            progress.note(f"fedprompt: round {record['round']}: {warning}")


def _summary(result: dict[str, Any], output: Path) -> None:
    best, final, last = result["best"], result["final"], result["last10"]
    click.echo(f"{result['algorithm']} on {result['dataset']}, {result['rounds']} rounds, seed {result['seed']}")
    click.echo(
        f"test accuracy: {best['accuracy']:.1%} at round {best['round']} (best on validation), {final['accuracy']:.1%} "
        f"at the end, {last['accuracy']:.1%} mean of the last {last['evaluations']} evaluations"
    )
    if result["pool_size"]:
        click.echo(
            f"pool: {result['pool_size']['first']} prompts at the start, {result['pool_size']['last']} at the end"
        )
    up, full = result["communication"]["up_bytes"], result["communication"]["full_model_bytes"]
    both = up + result["communication"]["down_bytes"]
    saved = f" ({1 - both / full:.2%} less than full fine-tuning)" if full else ""
    click.echo(f"sent: {both / 1e6:.1f} MB both ways{saved}; {result['seconds']['total']:.0f} s")
    click.echo(f"written: {output}/  (tensorboard --logdir {output.parent})")
