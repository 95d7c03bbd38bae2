"""Decentralized PFPT: neighbours' prompt sets are matched, not averaged. There is no published form.

Every client does what PFPT's server does (Weng et al., NeurIPS 2024, arXiv 2502.19752; ``pfpt.py``), with its
neighbours' prompt sets and its own. With i's neighbourhood N_i (i included), P_l the n prompts of client l:

    (φ, z) ← the generative set aggregation of { P_l : l in N_i }        (``set_aggregation.py``)
    prompt j of client i ← what stands for the candidate φ_k that z matches it to

So two clients' prompts are brought together by what they are, not by their number, and every client keeps n prompts: a
set can neither grow nor shrink, and clients still train as one group. Prompts of different meaning stay apart, as far
as the model tells them apart. What stands for φ_k is φ_k itself (``merged = fitted``, as in PFPT), which the fit moves
off the prompts that are matched to it, for every neighbourhood in another direction; or the mean of these prompts
(``mean``). While clients' prompts still lie in the order of their common start, that mean is what averaging them by
number gives (in a trial of three rounds on a ring, consensus distances differed in the fourth digit). Everything else
is averaged by W.

Clients with the same neighbourhood come to the same fit: on a full graph there is one, PFPT's own over all clients.
Prompts are sent whole: ``algorithm.compress`` is for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms.base import Metrics, State
from fedprompt.algorithms.decentralized.base import Decentralized, GossipSettings, Network
from fedprompt.algorithms.pfpt.pfpt import FitSettings
from fedprompt.algorithms.pfpt.set_aggregation import SetAggregation, aggregate_sets, mean_of_matched
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.registry import with_gradients
from fedprompt.models.params import Params, size_in_bytes

PROMPTS = ("pool", "prompt")


class DPFPTSettings(FitSettings, GossipSettings):
    """How a client fits the generative model to its neighbourhood, what it makes of a match, and who is around it.

    ``merged``: a prompt becomes the ``fitted`` candidate that it is matched to, or the ``mean`` of those matched to it.
    """

    merged: Literal["fitted", "mean"] = "fitted"


@algorithm(
    "dpfpt",
    "decentralized PFPT: neighbours' prompt sets matched by the generative model, the rest averaged",
    "after Weng et al., NeurIPS 2024 (no published form without a server)",
)
class DPFPT(Decentralized):
    """Matching in every neighbourhood."""

    kinds = PROMPTS
    optimizers = with_gradients("adam")
    Settings = DPFPTSettings
    settings: DPFPTSettings

    def is_mixed(self, name: str) -> bool:
        """What is not a prompt."""
        return super().is_mixed(name) and name not in PROMPTS

    def exchange(
        self, state: State, network: Network, trained: Sequence[Params], rng: np.random.Generator
    ) -> tuple[list[Params], State, Metrics]:
        """Mix by W what is not a prompt, match the prompts, and count both."""
        models, state, metrics = super().exchange(state, network, trained, rng)
        name = next(name for name in PROMPTS if name in trained[0])
        sent = network.messages * size_in_bytes({name: trained[0][name]})
        for way in ("up_bytes", "down_bytes"):
            metrics[way] += sent
        prompts, of_fits = self._match(torch.stack([params[name] for params in trained]), network, rng)
        return [{**model, name: own} for model, own in zip(models, prompts, strict=True)], state, {**metrics, **of_fits}

    def _match(self, sets: Tensor, network: Network, rng: np.random.Generator) -> tuple[list[Tensor], Metrics]:
        """Every client's next prompts, out of sets [n, P, D], and the mean over the fits of what they tell."""
        seed, settings = int(rng.integers(2**63)), self.settings.generative()
        fits: dict[tuple[int, ...], tuple[SetAggregation, Tensor]] = {}
        prompts = []
        for place in range(len(sets)):
            around = network.around(place)
            if len(around) == 1:  # nobody to match with
                prompts.append(sets[place].clone())
                continue
            if around not in fits:
                own = np.random.default_rng([seed, *(network.clients[other] for other in around)])
                fitted = aggregate_sets(sets[list(around)], settings, own)
                fits[around] = fitted, self._standing(sets[list(around)], fitted)
            fitted, standing = fits[around]
            prompts.append(standing[fitted.assignment[around.index(place)]])
        told = [{**fit.metrics, "candidates": fit.metrics["pool_size"]} for fit, _ in fits.values()]
        return prompts, {
            name: float(np.mean([metrics[name] for metrics in told]))
            for name in (told[0] if told else ())
            if name != "pool_size"
        }

    def _standing(self, sets: Tensor, fitted: SetAggregation) -> Tensor:
        """What stands for the candidates, [K', D]."""
        if self.settings.merged == "fitted":
            return fitted.pool
        return mean_of_matched(sets, fitted.assignment, len(fitted.pool))[0].to(sets.dtype)
