"""PFPT's set aggregation beyond prompts: hidden units of adapters, rank-one parts of LoRA.

P.-Y. Weng et al. (NeurIPS 2024, arXiv 2502.19752) suggest it as future work; there is no published form. The r hidden
units of an adapter, and the r rank-one parts of a LoRA matrix, have no order either:

    adapter:  Σ_j gelu(a_j · x + α_j) b_j          unit j = (a_j, α_j, b_j)
    LoRA:     Σ_j (a_j · x) b_j                    unit j = (a_j, b_j)

So each block's units are a set per client, matched as PFPT matches prompts (``set_aggregation.py``), every block for
itself. There is one difference: prompts are attended to, units are added up. Where m of the C clients are matched to a
candidate, its output vector b is multiplied by m / C; so units that stay apart add up to the clients' mean, not to C
times it, and a candidate that all clients share is left as it is. Everything else is averaged by samples.

``merged = mean`` takes the mean of the units that are matched to a candidate for the new unit, ``fitted`` the fitted φ,
as PFPT does. φ drifts off the units that it stands for (in a simulation with D = 384, 8 units and 5 clients that moved
by 0.003, the adapter's output was off by 103 % of its norm; the mean by 4 %), and prompts forgive that, sums do not.

Every local unit is matched to something, so sets can grow but not shrink; where clients move far they multiply without
end (adapters at a rate of 3e-3: from 8 units to 2,086 in nine rounds). Hence a cap, four times the first number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms.base import Algorithm, Count, Metrics, State
from fedprompt.algorithms.pfpt.pfpt import FitSettings
from fedprompt.algorithms.pfpt.set_aggregation import aggregate_sets
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.tasks import Update
from fedprompt.models.params import Params, weighted_mean

INPUTS, OUTPUTS = ("down", "down_bias", "a"), ("up", "b")  # last parts of the names of what makes a unit


class UnitSettings(FitSettings):
    """How the server fits the generative model, and what it makes of a match.

    ``merged``: a new unit is the ``mean`` of the matched ones, or the ``fitted`` candidate. ``max_units``: keep at most
    so many units of every set, the most used ones; left out: four times ``prompt.rank``.
    """

    merged: Literal["mean", "fitted"] = "mean"
    max_units: Count | None = None


@algorithm(
    "pfpt-units",
    "PFPT's set aggregation on the units of adapters or LoRA",
    "after Weng et al., NeurIPS 2024 (suggested there as future work)",
)
class PFPTUnits(Algorithm):
    """The generative set aggregation, block by block, on what adapters and LoRA are sums of."""

    kinds = ("adapter", "lora")
    Settings = UnitSettings
    settings: UnitSettings

    def resizes(self, name: str) -> bool:
        """Sets of units grow."""
        return _is_of_unit(name)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Match and merge every block's units, average the rest."""
        clients = [update.params for update in updates]
        common = [{n: v for n, v in params.items() if not _is_of_unit(n)} for params in clients]
        merged = weighted_mean(common, [update.samples for update in updates])
        metrics: list[Metrics] = []
        for group in sorted({name.rpartition(".")[0] for name in state.params if _is_of_unit(name)}):
            names = [name for name in state.params if name.rpartition(".")[0] == group and _is_of_unit(name)]
            units, of_fit = self._merge([{name: params[name] for name in names} for params in clients], rng)
            merged.update(units)
            metrics.append(of_fit)
        means = {name: float(np.mean([of_fit[name] for of_fit in metrics])) for name in metrics[0]}
        params = {name: merged[name] for name in state.params}
        return self.remember(replace(state, params=params), updates), means

    def _merge(self, clients: Sequence[Params], rng: np.random.Generator) -> tuple[Params, Metrics]:
        """One set of units: tensors [r, ...] of every client become tensors [r', ...]."""
        sets = torch.stack([_as_rows(params) for params in clients])  # [C, r, U]
        fitted = aggregate_sets(sets, self.settings.generative(), rng, self.cap)
        place, kept = fitted.assignment.flatten(), fitted.assignment.flatten() >= 0
        matched = torch.bincount(place[kept], minlength=len(fitted.pool))  # m, [r']
        share = matched / len(clients)
        merged = fitted.pool
        if self.settings.merged == "mean":
            sums = torch.zeros_like(merged).index_add(0, place[kept], sets.flatten(0, 1)[kept])
            merged = sums / matched[:, None]
        sizes = [value[0].numel() for value in clients[0].values()]
        parts = dict(zip(clients[0], merged.split(sizes, dim=1), strict=True))
        units = {name: part.reshape(-1, *clients[0][name].shape[1:]) for name, part in parts.items()}
        units = {n: v * share[:, None] if n.rpartition(".")[2] in OUTPUTS else v for n, v in units.items()}
        metrics = {name: value for name, value in fitted.metrics.items() if name != "pool_size"}
        return units, {"units": float(len(fitted.pool)), **metrics}

    @property
    def cap(self) -> int:
        """Most units that a set may have."""
        return self.settings.max_units or 4 * self.setting.rank

    def warnings(self, metrics: Metrics) -> list[str]:
        """Say so when all sets are full: units that few clients have are then lost."""
        full = metrics["units"] >= self.cap
        return [f"every set has reached its cap of {self.cap} units (algorithm.max_units)"] if full else []


def _is_of_unit(name: str) -> bool:
    return name.startswith(("adapter.", "lora.")) and name.rpartition(".")[2] in INPUTS + OUTPUTS


def _as_rows(params: Params) -> Tensor:
    """Tensors [r, ...] side by side, as one row [U] per unit."""
    return torch.cat([value.flatten(1) if value.ndim > 1 else value[:, None] for value in params.values()], dim=1)
