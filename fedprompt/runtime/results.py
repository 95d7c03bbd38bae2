"""result.json: what a run came to, from the lines of its metrics.jsonl."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fedprompt.blackbox.service import EVALUATION
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData
from fedprompt.data.fingerprint import summary
from fedprompt.runtime.worker import Facts

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "loss")
PACKAGES = ("fedprompt", "torch", "timm", "numpy", "scipy", "ray")
ASKED = "queries/"  # in a checkpoint's totals, before the number of a client
LAST = 10  # evaluations that `last10` is the mean of


def make_result(
    config: Config, data: FederatedData, facts: Facts, records: Sequence[dict[str, Any]], totals: dict[str, float]
) -> dict[str, Any]:
    """Put together ``result.json`` (its keys are a contract, see README)."""
    scored = [record for record in records if "test" in record and record["round"] > 0]
    last = scored[-LAST:]
    mean = {name: _mean([numbers_of(record).get(name) for record in last]) for name in numbers_of(last[-1])}
    sizes = [record.get("aggregate", {}).get("pool_size") for record in records]
    pools = [size for size in sizes if size is not None]
    cohorts, dropped, late, left_out = (
        sum(len(record.get(name, ())) for record in records) for name in ("cohort", "dropped", "late", "left_out")
    )
    transfers = 2 * int(totals["messages"]) if "messages" in totals else 2 * cohorts - dropped - late
    return {
        "algorithm": config.algorithm.name,
        "dataset": data.name,
        "data": summary(data.fingerprint),
        "backbone": config.backbone.name,
        "seed": config.seed,
        "rounds": config.federation.rounds,
        "final": numbers_of(scored[-1]),
        "best": best_of(records),
        "last10": {**mean, "round": last[-1]["round"], "evaluations": len(last)},
        "clients": scored[-1]["clients"],
        "per_class": dict(zip(data.class_names, scored[-1]["test"]["per_class"], strict=True)),
        "pool_size": {"first": int(pools[0]), "last": int(pools[-1])} if pools else None,
        "communication": {
            "up_bytes": int(totals["up_bytes"]),
            "down_bytes": int(totals["down_bytes"]),
            "full_model_bytes": transfers * facts.full_model_bytes,
        },
        **_agreement(records),
        "queries": _queries(totals),
        "dropped": dropped,
        "late": late,
        "left_out": left_out,
        "seconds": {stage: totals[stage] for stage in ("train", "aggregate", "evaluate", "total")},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _mean(numbers: Sequence[float | None]) -> float | None:
    """The mean; None where any of them is no number, which a model that has diverged leaves behind as its loss."""
    return None if None in numbers else float(np.mean(numbers))


def _or_least(number: float | None) -> float:
    return -math.inf if number is None else number


def _agreement(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """How far clients without a server are apart at the end, and the mean spectral gap of the rounds' graphs."""
    mixed = [record["aggregate"] for record in records if "spectral_gap" in record.get("aggregate", {})]
    if not mixed:
        return {}
    gap = _mean([metrics["spectral_gap"] for metrics in mixed])
    return {"consensus_distance": mixed[-1]["consensus_distance"], "spectral_gap": gap}


def asked_before(totals: Mapping[str, float]) -> dict[int, int]:
    """Queries by client that a checkpoint's totals tell of."""
    return {int(name.removeprefix(ASKED)): int(n) for name, n in totals.items() if name.startswith(ASKED)}


def _queries(totals: Mapping[str, float]) -> dict[str, Any] | None:
    """Queries to a black-box model: those of training, of evaluation, and by client; None where there is none."""
    asked = asked_before(totals)
    if not asked:
        return None
    evaluation = asked.pop(EVALUATION, 0)
    return {"train": sum(asked.values()), "evaluation": evaluation, "clients": {str(c): n for c, n in asked.items()}}


def best_of(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Numbers of the round that is best on validation, the first of equals; None where none is scored."""
    best = None
    for record in records:
        if "test" in record and record["round"] > 0 and is_better(numbers := numbers_of(record), best):
            best = numbers
    return best


def is_better(numbers: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether a later round is better on validation than the best so far."""
    return best is None or _or_least(numbers["validation_accuracy"]) > _or_least(best["validation_accuracy"])


def numbers_of(record: dict[str, Any]) -> dict[str, Any]:
    """What result.json tells of one scored round."""
    numbers = {name: record["test"][name] for name in SCORES}
    numbers |= {f"client_{name}": v for name, v in record["clients"].items() if isinstance(v, float)}
    return {**numbers, "validation_accuracy": record["validation"]["accuracy"], "round": record["round"]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
