"""FedSGD on prompts: clients send gradients, the server steps.

B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017, section 2:

    g_k = ∇F_k(w_t) on one batch of client k,    w_{t+1} = w_t − η Σ_{k in S_t} n_k / n · g_k

on prompts as in L. Collins, S. Wu, S. Oh, K. C. Sim: Profit: Benchmarking Personalization and Robustness Trade-off in
Federated Prompt Tuning. 2023, arXiv 2310.04627. The server's step is that of FedOpt along Δ = −Σ n_k g_k / n: its Adam,
Yogi, Adagrad, momentum, or the plain step above (``server = sgd``). ``local.epochs`` means nothing here; with a
``local.batch_size`` of a client's samples or more the gradient is that of all its data, as in McMahan et al.

What is personal cannot wait for a server: it makes one step of SGD with ``local.lr`` on the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field
from torch import Tensor

from fedprompt.algorithms.base import Metrics, Rate, State
from fedprompt.algorithms.fedopt import ServerOptimizer, ServerSettings
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.base import LocalOptions, LocalRule, Oracle, Slots
from fedprompt.client.tasks import Update
from fedprompt.models.params import Params, weighted_mean


class FedSGDSettings(ServerSettings):
    """The server's optimizer; a mean gradient is smaller than a mean move, and so are its rate and τ."""

    server_lr: Rate = 1e-3
    tau: float = Field(1e-6, ge=1e-18, le=1e18)


@algorithm(
    "fedsgd",
    "FedSGD: clients send the gradient of one batch, the server's optimizer steps",
    "McMahan et al., AISTATS 2017; on prompts Collins et al., Profit, 2023, arXiv 2310.04627",
)
class FedSGD(ServerOptimizer):
    """The server's optimizer on the clients' mean negative gradient."""

    optimizers = ("sgd",)
    needs_only_mean = True
    Settings = FedSGDSettings

    def epochs(self, epochs: int) -> float:
        """One batch, whatever a share of an epoch that is."""
        return 0.0

    def rule(self, options: LocalOptions, round: int) -> LocalRule:
        """No step but for what is personal."""
        return Descent(options, self.is_personal)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """One step of the server's optimizer; personal tensors are averaged, for scoring only."""
        mean = weighted_mean([update.params for update in updates], [update.samples for update in updates])
        return self.remember(self.stepped(state, mean, mean.__getitem__), updates), {}


class Descent(LocalRule):
    """Puts −g in the place of params that the server will step, and steps what is personal."""

    def __init__(self, options: LocalOptions, is_personal: Callable[[str], bool]) -> None:
        self._options, self._is_personal = options, is_personal

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        losses, grads = oracle.grad(params)
        own = {n: params[n] - self._options.rate(n) * grad for n, grad in grads.items() if self._is_personal(n)}
        return {**{name: -grad for name, grad in grads.items()}, **own}, slots, losses
