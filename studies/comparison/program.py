"""All methods of the PFPT study on the same clients, data and budget: searches of rates, then tables.

The headline methods under three kinds of skew of three data sets, on three seeds; whole backbones where there are few
images; every other method and form once; and those that a claim is about on eight seeds of the first setting, and of a
data set that nothing was chosen on.
Everything but the method and its rates is the configuration's default, except for fewer rounds and bfloat16, to save
time. The rates are searched at α = 0.1 on a seed that is used for nothing else, judged by the mean of the evaluations
on the validation split: with six trials for every headline method, and on every data set of few images with seven,
those six at twice the rates and what all images chose, which all run with, too. A method that runs once takes the rates
of its next of kin.

Runs lie below runs/comparison. The CSV has a row per run and is written anew whenever one ends; all tables and the
figure are made of it. With --json FILE, which gets the chosen rates, the CSV, one of all evaluations and the figure are
written next to it. A run is not repeated once it is done or has a row there, so that the committed table can be
widened on any machine; delete its row to have it run again. One process per core, one thread each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.training import QUICK
from fedprompt.tracking import metrics
from fedprompt.tracking.files import write_atomic
from studies.comparison.contestants import (
    ALL_IMAGES,
    APART,
    BEHIND,
    CAPPED,
    CLAIMED,
    CONTROLS,
    DATA,
    FEW_IMAGES,
    FIRST,
    FOR_WHOLE,
    HEADLINE,
    IN_STUDY,
    MORE_SEEDS,
    ONCE,
    SEARCHED_UNDER,
    SEEDS,
    SETTINGS,
    SETTLED,
    SKEW,
    STUDY,
    UNSEARCHED,
    UNTUNED,
    WHOLE,
    WITH_TRIALS,
    Overrides,
    setting_of,
    twice,
)
from studies.comparison.tables import figure, show, tables
from studies.many_runs import SEARCH, Job, Kept, chosen, rows_of, run_stages, sorted_by_names

SHARED: Overrides = (
    *("federation.rounds=20", "runtime.precision=bfloat16", "runtime.workers=1"),
    *UNSEARCHED,
)
SEARCHED: Overrides = ("seed=100", "federation.rounds=8", "federation.eval_every=2")
TINY: Overrides = (
    *(*QUICK, "backbone.image_size=32", "prompt.layer=2", "data.limit=300", "federation.clients=4"),
    *("federation.cohort=2", "federation.rounds=2", "federation.eval_every=1", "tracking.tensorboard=false"),
)

DRAWN = ("headline", "study")  # stages whose runs' curves are kept

Run = tuple[str, str, int, Overrides, Overrides]  # setting, method, seed, its rates, what makes the method
Kin = Mapping[str, tuple[Overrides, str]]  # name: (what makes the method, whose chosen rates it takes)


def main(json_path: Path | None, quick: bool = False) -> None:
    """Search, run, print the tables; ``quick`` shows with two methods and settings on a tiny backbone that it works."""
    root = Path("runs") / ("comparison-quick" if quick else "comparison")
    base = root / "comparison" if json_path is None else json_path.with_suffix("")
    plan = (_search, _search_again, _once, _untuned, _headline, _carried, _apart, _study)
    stages = (partial(stage, root, quick) for stage in plan)
    done = run_stages(base.with_suffix(".csv"), table, *stages, kept=rows_of(base.with_suffix(".csv")))
    runs = pd.read_csv(base.with_suffix(".csv"), float_precision="round_trip")
    evaluations = curves(done, base.with_suffix(".curves.csv"))
    write_atomic(base.with_suffix(".curves.csv"), evaluations.to_csv(index=False, float_format="%.4g").encode())
    show(tables(runs), figure(runs), base.with_suffix(".csv"))
    if json_path is not None:
        told = {
            data: {method: " ".join(rates) for method, rates in best.items()} for data, best in best_rates(done).items()
        }
        json_path.write_text(json.dumps({"chosen": told}, indent=1) + "\n")


def _search(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    """On all images, of all that have trials."""
    return _trials(root, quick, ALL_IMAGES, {method: trials for method, (_, trials) in WITH_TRIALS.items()})


def _search_again(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    """On data sets of few images, of the headline methods: what all images chose, and the trials at twice the rates.

    Not of whole backbones, for their time.
    """
    first = {} if quick else best_rates(done)[ALL_IMAGES]
    trials = {name: (first[name], *map(twice, HEADLINE[name][1])) for name in HEADLINE if name in first}
    return [job for data in FEW_IMAGES for job in _trials(root, quick, data, trials)]


def _trials(root: Path, quick: bool, data: str, trials: Mapping[str, Sequence[Overrides]]) -> list[Job]:
    setting = setting_of(data, SEARCHED_UNDER)
    return [
        Job(
            *(root, SEARCH, setting, method, 100, trial),
            rest=(*SHARED, *WITH_TRIALS[method][0], *SETTINGS[setting], *SEARCHED, *_small(quick)),
        )
        for method, its_trials in _some(trials, quick).items()
        for trial in its_trials[: 2 if quick else None]
    ]


def best_rates(done: Sequence[Job | Kept]) -> dict[str, dict[str, Overrides]]:
    """By data set and method: its best trial there, or on all images where there was none."""
    settings = {data: setting_of(data, SEARCHED_UNDER) for data in DATA}
    trials = [run for run in done if run.searches]
    own = {data: chosen(run for run in trials if run.setting == setting) for data, setting in settings.items()}
    return {data: {**own[ALL_IMAGES], **rates} for data, rates in own.items()}


def _headline(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    rates = best_rates(done)
    data_of = {setting_of(data, skew): data for data in DATA for skew in SKEW}
    planned = [
        *product(_some(SETTINGS, quick), SEEDS[: 1 if quick else None], _some(HEADLINE, quick)),
        *product([FIRST], () if quick else MORE_SEEDS, SETTLED),
        *product(() if quick else FOR_WHOLE, SEEDS, WHOLE),
    ]
    runs = [
        (setting, method, seed, rates[data_of[setting]][method], WITH_TRIALS[method][0])
        for setting, seed, method in planned
    ]
    return _at_full_length(root, quick, "headline", runs)


def _carried(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    """The headline methods on few images with the rates of all images, where other ones were chosen there."""
    if quick:
        return []
    rates = best_rates(done)
    first = rates[ALL_IMAGES]
    runs = [
        (setting, method, seed, first[method], HEADLINE[method][0])
        for data in FEW_IMAGES
        for setting in [setting_of(data, SEARCHED_UNDER)]
        for seed, method in product(SEEDS, HEADLINE)
        if rates[data][method] != first[method]
    ]
    return _at_full_length(root, quick, "carried", runs)


def _apart(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    data, skew = BEHIND
    rates = best_rates(done)[data]
    runs = _with_rates_of_kin(rates, [setting_of(data, skew)], () if quick else SEEDS, APART)
    return _at_full_length(root, quick, "apart", runs)


def _study(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    rates = best_rates(done)[ALL_IMAGES]
    runs = _with_rates_of_kin(rates, STUDY, () if quick else SEEDS, {**_searched(IN_STUDY), **CAPPED})
    return _at_full_length(root, quick, "study", runs)


def _untuned(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    rates = best_rates(done)[ALL_IMAGES]
    methods = _some({**_searched(CLAIMED), **CONTROLS}, quick)
    runs = _with_rates_of_kin(rates, UNTUNED, (*SEEDS, *MORE_SEEDS)[: 2 if quick else None], methods)
    return _at_full_length(root, quick, "untuned", runs)


def _once(root: Path, quick: bool, done: Sequence[Job | Kept]) -> list[Job]:
    rates = best_rates(done)[ALL_IMAGES]
    runs = [(FIRST, name, 0, _inherited(makes, rates, kin), makes) for name, (makes, kin) in _some(ONCE, quick).items()]
    return _at_full_length(root, quick, "once", runs)


def _searched(methods: Iterable[str]) -> Kin:
    """Headline methods, each with its own rates."""
    return {method: (HEADLINE[method][0], method) for method in methods}


def _with_rates_of_kin(
    rates: Mapping[str, Overrides], settings: Iterable[str], seeds: Iterable[int], methods: Kin
) -> list[Run]:
    planned = product(settings, seeds, methods.items())
    return [(setting, method, seed, rates[kin], makes) for setting, seed, (method, (makes, kin)) in planned]


def _at_full_length(root: Path, quick: bool, stage: str, runs: Iterable[Run]) -> list[Job]:
    keys = {**SETTINGS, **UNTUNED, **STUDY}
    return [
        Job(
            *(root, stage, setting, method, seed, rates),
            rest=(*SHARED, *makes, *keys[setting], f"seed={seed}", *_small(quick)),
        )
        for setting, method, seed, rates, makes in runs
    ]


def _small(quick: bool) -> Overrides:
    return TINY if quick else ()


def _some(methods: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    return dict(list(methods.items())[: 2 if quick else None])


def _inherited(makes: Overrides, rates: Mapping[str, Overrides], kin: str) -> Overrides:
    """The rates of the next of kin, without what the method itself settles, or does not have."""
    own = {key.partition("=")[0] for key in makes}
    same_method = f"algorithm.name={kin.split(',')[0]}" in makes
    return tuple(
        key
        for key in rates.get(kin, ())
        if key.partition("=")[0] not in own and (same_method or not key.startswith("algorithm."))
    )


def table(runs: Sequence[Job | Kept]) -> pd.DataFrame:
    """A row per run, whichever ended first; accuracies from 0 to 1, bytes and seconds per round.

    Of a run that diverged all is missing but what it was. A run at rates that are no longer chosen gives way to the new
    one's.
    """
    rows = pd.DataFrame([run.row if isinstance(run, Kept) else _row(run) for run in runs])
    stages = (SEARCH, "headline", "carried", "apart", "study", "untuned", "once")
    names = (*stages, *SETTINGS, *STUDY, *UNTUNED, *WITH_TRIALS, *APART, *CAPPED, *ONCE)
    order = ("stage", "setting", "method", "seed", "rates")
    same = rows[list(order)].assign(rates=rows.rates.where(rows.stage == SEARCH)).duplicated(keep="last")
    return sorted_by_names(rows[~same], order, names)


def _row(job: Job) -> dict[str, Any]:
    what = {
        **{name: getattr(job, name) for name in ("stage", "setting", "method", "seed")},
        "rates": " ".join(job.rates),
    }
    return what if job.failed else {**what, **_scores(job)}


def _scores(job: Job) -> dict[str, Any]:
    result = job.result
    sent, rounds = result["communication"], result["rounds"]
    both = sent["up_bytes"] + sent["down_bytes"]
    last = result["last10"]
    return {
        "validation": job.validation,
        **{name: result[name]["accuracy"] for name in ("best", "final", "last10")},
        "last10_clients": last["client_mean_accuracy"],
        "last10_worst_decile": last["client_worst_decile_accuracy"],
        "last10_balanced": last["balanced_accuracy"],
        "last10_own_head": last.get("client_own_head_global_accuracy"),
        "last10_averaged_head": last.get("client_averaged_head_global_accuracy"),
        "bytes_per_round": both / rounds,
        "saved_of_full": 1 - both / sent["full_model_bytes"],
        "seconds_per_round": result["seconds"]["total"] / rounds,
        "pool_last": (result["pool_size"] or {}).get("last"),
    }


def curves(runs: Sequence[Job | Kept], earlier: Path) -> pd.DataFrame:
    """A row per evaluation of the runs whose curves are shown, if they did not fail: accuracies from 0 to 1.

    Of kept runs the rows are those of the table ``earlier``.
    """
    rows = [
        {
            **{name: getattr(job, name) for name in ("setting", "method", "seed")},
            "round": record["round"],
            **{split: record[split]["accuracy"] for split in ("test", "validation")},
        }
        for job in runs
        if isinstance(job, Job) and job.stage in DRAWN and not job.failed
        for record in metrics.read(job.folder / "metrics.jsonl")
        if "test" in record
    ]
    kept = [pd.read_csv(earlier, float_precision="round_trip")] if earlier.exists() else []
    order = ("setting", "method", "seed", "round")
    both = pd.concat([*kept, pd.DataFrame(rows)]).drop_duplicates(order, keep="last")
    return sorted_by_names(both, order, (*SETTINGS, *STUDY, *WITH_TRIALS, *CAPPED))
