"""PFPT with a memory: a pool in closed form, and a head that is averaged over everybody. There is no published form.

A cohort is a small and skewed sample of the clients, and what it agrees on swings with who is in it. Of all that is
trained the head swings most, as it leans to the classes of the cohort. So the server remembers every client's newest
head and averages these (``memory.py``), while the pool is that of ``pfpt_map.py``, fitted to the cohort's prompts: they
follow the data of all classes alike, and remembering them only slows them down (studies/ablations has the numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedprompt.algorithms.base import Metrics, State
from fedprompt.algorithms.memory import heads, remembered_mean
from fedprompt.algorithms.pfpt.pfpt_map import PFPTMap
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.tasks import Update


@algorithm(
    "pfpt-mem",
    "PFPT in closed form, with a head that is averaged over all clients that were ever heard of",
    "after Weng et al., NeurIPS 2024 (no published form)",
)
class PFPTMem(PFPTMap):
    """The closed-form set aggregation of the cohort, and everybody's newest heads; settings are those of pfpt-map."""

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Fit the pool to the cohort's sets, average everybody's heads."""
        after, metrics = super().aggregate(state, updates, rng)
        after, everybodys, told = remembered_mean(after, heads(updates))
        return replace(after, params={**after.params, **everybodys}), {**metrics, **told}
