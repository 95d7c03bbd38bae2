"""PFPT with a memory: the prompt sets of all clients are aggregated, not only the cohort's. There is no published form.

The closed form of ``pfpt_map.py``, fitted to the newest set of every client that the server has heard of
(``memory.py``): a cohort is a small and skewed sample, and a pool that is fitted to it follows whoever is in it. What
is not a prompt is averaged over the same clients by the number of samples, as in ``fedmem.py``.

A set that was sent rounds ago is of a pool that is no more. So what is remembered moves with the pool: after a round
every remembered prompt stands where it was matched to, and is forgotten where that was dropped. Of prompts that came
later a client has no version; there it stands for leaving them as they are, as those do that did not use a prompt.
A prompt stays in the pool as long as it was in use when somebody was last heard of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms.base import Metrics, State
from fedprompt.algorithms.memory import changed, heard
from fedprompt.algorithms.pfpt_map import PFPTMap
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.tasks import Update


@algorithm(
    "pfpt-mem",
    "PFPT in closed form, fitted to the newest prompt sets of every client that was ever heard of",
    "after Weng et al., NeurIPS 2024 (no published form)",
)
class PFPTMem(PFPTMap):
    """The closed-form set aggregation of everybody's newest sets; the settings are those of ``pfpt-map``."""

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Fit the pool to the sets of all that have been heard of, and put what is remembered in the new order."""
        state, newest, told = heard(state, updates)
        own = [update.params["pool"] for update in newest]  # [P, D], NaN where a client has no version
        whole = [
            replace(update, params={**update.params, "pool": torch.where(pool.isnan(), state.params["pool"], pool)})
            for update, pool in zip(newest, own, strict=True)
        ]
        used = self.used(state, newest)
        after, fitted, metrics = self.next_pool(state, whole, used, rng)
        size = len(fitted.pool)
        params = [
            {**update.params, "pool": moved(pool[used], places, size, fill=torch.nan)}
            for update, pool, places in zip(newest, own, fitted.assignment, strict=True)
        ]
        selected = [
            moved(update.selected[used], places, size, fill=False)
            for update, places in zip(newest, fitted.assignment, strict=True)
        ]
        return self.remember(changed(after, params, selected), updates), {**metrics, **told}


def moved(values: Tensor, places: Tensor, size: int, fill: float | bool) -> Tensor:
    """What stands at n old places, at their new ones [size, ...]; ``places`` [n] is -1 where a prompt was dropped."""
    kept = places >= 0
    result = values.new_full((size, *values.shape[1:]), fill)
    result[places[kept]] = values[kept]
    return result
