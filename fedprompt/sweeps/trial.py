"""One trial of a sweep, as Tune runs it: the driver of a run whose workers live in the trial's own placement group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ray import tune
from ray.util.placement_group import get_current_placement_group

from fedprompt.failure import DETAILS, UNTOLD, told
from fedprompt.personalization.personalize import Personalize, after_run, personalize, written
from fedprompt.runtime.build import divided_data
from fedprompt.runtime.checkpoints.resuming import check_data
from fedprompt.runtime.folders.holders import InUse
from fedprompt.runtime.folders.locks import Held, PassedOn
from fedprompt.runtime.ray import places
from fedprompt.runtime.ray.driver import Driver
from fedprompt.runtime.ray.pool import RayPool
from fedprompt.runtime.run import held_trial
from fedprompt.sweeps.space import Trial

TIME, METRIC = "round", "validation_accuracy"  # of what schedulers compare
ERROR, NOTES = "error", "notes"  # in a report: why a trial has failed, what the user should know of its data


def bundles(trial: Trial) -> tune.PlacementGroupFactory:
    """What a trial asks the cluster for: what a run does, and before that an empty bundle for the driver.

    The driver computes while its workers wait, and waits while they compute: with a share of its own, two trials of one
    worker with one core each would not fit on two cores.
    """
    return tune.PlacementGroupFactory([{}, *places.bundles(trial.config)])


def run_trial(
    chosen: dict[str, Any],
    trials: Sequence[Trial],
    output: str,
    personal: Personalize | None = None,
    sweep: PassedOn | None = None,
) -> None:
    """Run a trial, or what is left of it, in its folder of ``output``, and report every round to Tune.

    Its clients are then personalized, where ``personal`` says how. ``sweep``: what the sweep's command holds.
    The last round is reported when all results are there: no scheduler can stop a run that has only to be told of.
    What goes wrong is a report, too: Tune repeats a trial whose process died, but not one that would fail again.
    """
    trial = trials[chosen["trial"]]
    folder = Path(output) / trial.name
    last: dict[str, Any] = {}
    try:
        with held_trial(trial.config, folder, f"fedprompt sweep, trial {trial.name}", sweep or PassedOn()) as held:
            (folder / DETAILS).unlink(missing_ok=True)
            last = _run(trial, folder, held)
            if personal and ERROR not in last:
                _personalize(trial, personal, folder, sweep and sweep.session)
    except UNTOLD:
        raise
    except InUse as error:
        tune.report({ERROR: str(error)})
        return  # nothing is written there, not even why
    except BaseException as error:  # of a method of the user's own, for one
        last = {ERROR: told(error, folder, trial.config.to_yaml())["error"]}
    if ERROR in last and not (folder / DETAILS).exists() and folder.is_dir():
        (folder / DETAILS).write_text(f"{last[ERROR]}\n", encoding="utf-8")
    if last:
        tune.report(last)


def _run(trial: Trial, folder: Path, held: Held) -> dict[str, Any]:
    """Run a trial and report all rounds but the last, which is returned, or its error; notes go with the next round."""
    last: dict[str, Any] = {}
    notes: list[str] = []
    driver = Driver(trial.config, str(folder), get_current_placement_group(), held)
    with closing(driver.run()) as records:
        for record in records:
            if "error" in record:
                last = {ERROR: record["error"]}
            elif "note" in record:
                notes.append(record["note"])
            elif "round" in record:
                told, notes = {**_numbers(record), NOTES: notes}, []
                if record["round"] < trial.config.federation.rounds:
                    tune.report(told)
                else:
                    last = told
            elif "result" in record:
                last = last or {TIME: trial.config.federation.rounds}  # all rounds were there before
    return last


def _personalize(trial: Trial, settings: Personalize, folder: Path, session: str | None) -> None:
    """What ``fedprompt personalize`` does, with the trial's own workers; rates that are done are not repeated."""
    plan, data = after_run(folder, trial.config, settings), divided_data(trial.config)
    check_data(plan.checkpoint, trial.config, data.fingerprint)
    with (
        written(plan, session),
        closing(RayPool(trial.config, data, get_current_placement_group())) as pool,
    ):
        personalize(plan, data, pool, say=lambda line: None)


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """What Tune is told of a round; accuracies where it was scored."""
    scored = {f"{split}_accuracy": record[split]["accuracy"] for split in ("validation", "test") if split in record}
    return {TIME: record["round"], **scored}
