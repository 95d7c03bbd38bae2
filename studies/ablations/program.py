"""What PFPT's parts are good for, and what its pool's size depends on: the default run, changed in one place at a time.

Ablations run on three seeds at α = 0.1, the telling ones under dominant classes and at α = 0.5, too; sensitivities run
once, on seed 0. Rates are those that the comparison's search chose for PFPT, except where a rate is what is changed;
everything else is as in that comparison, too, so that a difference to the row *pfpt* is that of the change, on the same
clients and data.

Runs lie below runs/ablations and are not repeated once they are done. The CSV has a row per run and is written anew
whenever one ends; all tables and the figure are made of it (with --json FILE it is written next to that). One process
per core, one thread each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pandas as pd

from fedprompt.data.heterogeneity import feature_distance, measures
from fedprompt.tracking import metrics
from studies.ablations.tables import BASE, FIRST, figure, tables
from studies.comparison.contestants import SEEDS, SKEW, Overrides
from studies.comparison.program import SHARED, TINY
from studies.comparison.tables import show
from studies.many_runs import Job, memory, run_stages

RATES: Overrides = ("local.lr=0.0005", "local.prompt_lr=0.001")  # what the comparison's search chose for PFPT

# name: what is changed
ABLATIONS: dict[str, Overrides] = {
    BASE: (),
    "slot by slot": ("algorithm.name=fedavg", "prompt.kind=pool"),
    "no prior": ("algorithm.prior=none",),
    "reference prior": ("algorithm.prior=reference",),
    "joint schedule": ("algorithm.schedule=joint",),
    "5 sweeps": ("algorithm.sweeps=5",),
    "pool of 20 at most": ("algorithm.max_pool=20",),
    "instance selection": ("prompt.selection=instance",),
    "no similarity term": ("prompt.similarity=0",),
    "similarity term subtracted": ("prompt.similarity=-0.01",),
    "frozen query": ("prompt.query=frozen",),
    "identity query": ("prompt.query=identity",),
    "personal heads": ("head.personal=true",),
    "remembered heads": ("algorithm.name=pfpt-mem",),
    "slot by slot, remembered heads": ("algorithm.name=fedmem", "prompt.kind=pool", "algorithm.remembers=head"),
    "slot by slot, all remembered": ("algorithm.name=fedmem", "prompt.kind=pool"),
    "everybody takes part": ("federation.cohort=20",),
}
TELLING = (BASE, "slot by slot", "remembered heads", "slot by slot, remembered heads")

# key, what it is called in tables, and its values; the default is the row *pfpt*
VARIED: dict[str, tuple[str, tuple[str, ...]]] = {
    "alpha": ("partition.alpha", ("0.05", "0.2", "1", "5")),
    "share of the dominant class": ("partition.kind=dominant partition.dominant_share", ("0.5", "0.9")),
    "long tail's factor": ("partition.imbalance_factor", ("10", "50")),
    "data sets": ("data.name", ("digits", "fashion-mnist-small+digits")),
    "data sets, alpha 5": ("partition.alpha=5 data.name", ("digits", "fashion-mnist-small+digits")),
    "prompts at the start": ("prompt.pool_size", ("10", "50")),
    "prompts at the start, 5 per batch": ("prompt.top_k=5 prompt.pool_size", ("5",)),
    "prompts per batch": ("prompt.top_k", ("2", "5", "20")),
    "local epochs": ("local.epochs", ("1", "5")),
    "clients per round": ("federation.cohort", ("2", "10")),
    "prompts' rate": ("local.prompt_lr", ("1e-4", "3e-3", "1e-2")),
}
TOLD = {"moved": "moved_relative", "drift": "drift_relative", "changed": "changed"}  # columns: metrics of a round


def main(json_path: Path | None, quick: bool = False) -> None:
    """Run what is left, print the tables, draw the figure; ``quick`` shows on a tiny backbone that it works."""
    root = Path("runs") / ("ablations-quick" if quick else "ablations")
    csv = root / "ablations.csv" if json_path is None else json_path.with_suffix(".csv")
    run_stages(csv, table, *(partial(stage, root, quick) for stage in (_ablations, _telling, _sensitivities)))
    runs = pd.read_csv(csv, float_precision="round_trip")
    show(tables(runs), figure(runs), csv)
    if json_path is not None:
        json_path.write_text(json.dumps({"rates": list(RATES), "shared": list(SHARED)}, indent=1) + "\n")


def _ablations(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    names = list(ABLATIONS)[: 2 if quick else None]
    seeds = SEEDS[: 1 if quick else None]
    return [_job(root, FIRST, name, seed, ABLATIONS[name], quick) for seed in seeds for name in names]


def _telling(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    skews = [] if quick else [skew for skew in SKEW if skew != FIRST]
    return [
        _job(root, skew, name, seed, (*SKEW[skew], *ABLATIONS[name]), quick)
        for skew in skews
        for seed in SEEDS
        for name in TELLING
    ]


def _sensitivities(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    return [
        _job(root, what, value, 0, (*keys.split()[:-1], f"{keys.split()[-1]}={value}"), quick)
        for what, (keys, values) in list(VARIED.items())[: 1 if quick else None]
        for value in values[: 2 if quick else None]
    ]


def _job(root: Path, setting: str, name: str, seed: int, changes: Overrides, quick: bool) -> Job:
    rest = (*SHARED, "algorithm.name=pfpt", *RATES, *changes, f"seed={seed}", *(TINY if quick else ()))
    return Job(root, "ablation", setting, name, seed, rates=(), rest=rest)


def table(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per run that did not fail: accuracies from 0 to 1, prompts in the pool, what aggregation tells on average.

    ``pool`` is the pool's size at the end, ``pools`` are its sizes round by round.
    ``moved``, ``drift`` and ``changed`` are means over rounds of the metrics of the set aggregation: how far local
    prompts move and how far the pool is from the prompts matched to it, both relative to the prompts' own length, and
    the share of assignments that the last sweep changed. ``labels_apart`` is the total variation between clients'
    labels, ``features_apart`` the distance between their features.
    """
    rows = []
    for job in (job for job in jobs if not job.failed):
        result = job.result
        told = pd.DataFrame(
            record["aggregate"] for record in metrics.read(job.folder / "metrics.jsonl") if record.get("aggregate")
        )
        rows.append(
            {
                **{name: getattr(job, name) for name in ("setting", "method", "seed")},
                "validation": result["last10"]["validation_accuracy"],
                **{name: result[name]["accuracy"] for name in ("best", "final", "last10")},
                "own_head": result["last10"].get("client_own_head_global_accuracy"),
                "pool": (result["pool_size"] or {}).get("last"),
                "pools": " ".join(f"{size:.0f}" for size in told.get("pool_size", ())),
                **{name: told[key].mean() if key in told else None for name, key in TOLD.items()},
                **_apart(job.overrides),
            }
        )
    order = [
        *((skew, name) for skew in SKEW for name in ABLATIONS),
        *((w, v) for w, (_, vs) in VARIED.items() for v in vs),
    ]
    rows.sort(key=lambda row: (order.index((row["setting"], row["method"])), row["seed"]))
    return pd.DataFrame(rows)


@cache
def _apart(overrides: Overrides) -> dict[str, float]:
    from fedprompt.client.examples import Examples
    from fedprompt.config.parsing import load
    from fedprompt.runtime.build import build_data, frozen_features

    config = load(None, list(overrides))
    data = build_data(config)
    split = data.train.split
    raw = Examples(split.labels, split.domains, split.inputs)
    known = memory().get(config, "class features", raw, lambda: replace(raw, query=frozen_features(config, split)))
    return {
        "labels_apart": measures(data.class_counts())["total_variation"],
        "features_apart": feature_distance(known.query[data.train.indices], data.clients),
    }
