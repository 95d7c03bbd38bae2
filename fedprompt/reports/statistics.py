"""Is a method better than the baseline? Paired over seeds: a seed's runs share data, partition and cohorts.

The baseline of a method is the best other one of its setting, and it is chosen on validation accuracy, so that the test
set is asked once. p-values are corrected over a setting's comparisons (Holm, Scandinavian Journal of Statistics 1979).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from fedprompt.reports.groups import Group

WILCOXON_FROM = 6  # pairs: with fewer, not even a difference on every seed reaches p < 0.05


@dataclass(frozen=True)
class Comparison:
    """Mean difference of test accuracy (method minus baseline, last ten evaluations) over the seeds that both have."""

    method: str
    baseline: str
    seeds: tuple[int, ...]
    difference: float
    low: float  # of the 95 % confidence interval (t)
    high: float
    p_t: float
    p_wilcoxon: float | None  # None: fewer than WILCOXON_FROM pairs
    p_t_holm: float = float("nan")
    p_wilcoxon_holm: float | None = None


def compare(groups: Sequence[Group]) -> dict[str, Comparison]:
    """Compare the methods of one setting, {method: comparison}; those that share no two seeds with another are absent.

    The best two are each other's baseline: that is one test, and Holm's correction counts it once.
    """
    found = {}
    for group in groups:
        others = [o for o in groups if o is not group and len(_shared(group, o)) >= 2]
        if others:
            found[group.method] = _paired(group, max(others, key=lambda other: other.validation))
    pairs = {frozenset((c.method, c.baseline)): c for c in found.values()}
    of_t = dict(zip(pairs, holm([c.p_t for c in pairs.values()])))
    ranked = {pair: c.p_wilcoxon for pair, c in pairs.items() if c.p_wilcoxon is not None}
    of_wilcoxon = dict(zip(ranked, holm(list(ranked.values()))))
    return {
        method: replace(c, p_t_holm=of_t[pair], p_wilcoxon_holm=of_wilcoxon.get(pair))
        for method, c in found.items()
        for pair in [frozenset((c.method, c.baseline))]
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; an undefined p counts as a test that was made, and stays undefined."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)  # NaN last
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    result = np.empty(len(p))
    result[order] = adjusted
    return result.tolist()


def smallest_wilcoxon_p(pairs: int) -> float:
    """The two-sided p of Wilcoxon's signed-rank test where all ``pairs`` differences have the same sign."""
    return 2 / 2**pairs


def accuracies(group: Group) -> dict[int, float]:
    """Test accuracy of every seed, mean of the last ten evaluations."""
    return {run.seed: run.result["last10"]["accuracy"] for run in group.runs}


def _shared(one: Group, other: Group) -> tuple[int, ...]:
    return tuple(sorted(set(one.seeds) & set(other.seeds)))


def _paired(method: Group, baseline: Group) -> Comparison:
    seeds = _shared(method, baseline)
    ours, theirs = (np.array([accuracies(group)[seed] for seed in seeds]) for group in (method, baseline))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Equal differences have no spread: scipy warns, and t and p are not defined.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_rel(ours, theirs)
        interval = test.confidence_interval(0.95)
    p_wilcoxon = None
    if len(seeds) >= WILCOXON_FROM and np.any(ours != theirs):
        p_wilcoxon = float(stats.wilcoxon(ours, theirs).pvalue)
    spread = np.ptp(ours - theirs) > 1e-12
    return Comparison(
        method=method.method,
        baseline=baseline.method,
        seeds=seeds,
        difference=float(np.mean(ours - theirs)),
        low=float(interval.low) if spread else float("nan"),
        high=float(interval.high) if spread else float("nan"),
        p_t=float(test.pvalue) if spread else float("nan"),
        p_wilcoxon=p_wilcoxon,
    )
