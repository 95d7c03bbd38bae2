"""FedOpt on prompts (FedOpt-PT): FedAdam, FedYogi, FedAdagrad, and server momentum.

S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan: Adaptive Federated
Optimization. ICLR 2021, arXiv 2003.00295. Algorithm 2; the server takes the cohort's mean move for a gradient:

    Δ_t = Σ n_i (x_i − x_t) / Σ n_i,    m_t = β1 m_{t−1} + (1 − β1) Δ_t
    adagrad:  v_t = v_{t−1} + Δ_t²
    yogi:     v_t = v_{t−1} − (1 − β2) Δ_t² sign(v_{t−1} − Δ_t²)
    adam:     v_t = β2 v_{t−1} + (1 − β2) Δ_t²
    x_{t+1} = x_t + η m_t / (√v_t + τ)                 with v_{−1} = τ², without bias correction

``momentum`` is FedAvgM (Hsu, Qi, Brown 2019): m_t = β1 m_{t−1} + Δ_t, x_{t+1} = x_t + η m_t; ``sgd`` is x_t + η Δ_t,
and at η = 1 FedAvg. Clients count by their number of samples, as in the paper's experiments.

``form = reference`` is the form in the published code of the PFPT study (Weng et al., NeurIPS 2024): x_t is scored,
but clients go on from the plain average and never receive it; Δ_t is that average minus x_t. (Their Adam corrects its
bias; here it is the one above.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedprompt.algorithms.base import Algorithm, MethodSettings, Metrics, Rate, State
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.tasks import Update
from fedprompt.models.params import Params, weighted_mean

AVERAGE = "average"  # in the state's memory: what clients go on from in the published code's form


class ServerSettings(MethodSettings):
    """``server``: its optimizer. ``server_lr``: η. ``tau``: τ, the start of √v."""

    server: Literal["adam", "yogi", "adagrad", "momentum", "sgd"] = "adam"
    server_lr: Rate = 1e-2
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    tau: float = Field(1e-3, ge=1e-18, le=1e18)  # its square is a float32


class FedOptSettings(ServerSettings):
    """The server's optimizer. ``form``: the paper's or the published code's."""

    form: Literal["paper", "reference"] = "paper"


class ServerOptimizer(Algorithm):
    """A server that keeps first and second moments of all that travels, and steps along a direction Δ."""

    needs_only_mean = True
    Settings = ServerSettings
    settings: ServerSettings

    def init(self, params: Params, rng: np.random.Generator) -> State:
        """x as drawn, m = 0 and v = τ²."""
        state = super().init(params, rng)
        first = {name: torch.zeros_like(value) for name, value in params.items() if self.travels(name)}
        second = {name: torch.full_like(value, self.settings.tau**2) for name, value in first.items()}
        return replace(state, memory={**state.memory, "first": first, "second": second})

    def stepped(self, state: State, average: Params, delta: Callable[[str], Tensor]) -> State:
        """The state after one step along ``delta`` of every tensor that travels; ``average`` is what others become."""
        params, first, second = dict(average), {}, {}
        for name, m in state.memory["first"].items():
            first[name], second[name], move = self._move(m, state.memory["second"][name], delta(name))
            params[name] = state.params[name] + self.settings.server_lr * move
        return replace(state, params=params, memory={**state.memory, "first": first, "second": second})

    def _move(self, m: Tensor, v: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next m and v of one tensor, and the direction of its step."""
        s, square = self.settings, delta.square()
        if s.server == "sgd":
            return m, v, delta
        if s.server == "momentum":
            m = s.beta1 * m + delta
            return m, v, m
        m = s.beta1 * m + (1 - s.beta1) * delta
        if s.server == "adagrad":
            v = v + square
        elif s.server == "yogi":
            v = v - (1 - s.beta2) * square * torch.sign(v - square)
        else:
            v = s.beta2 * v + (1 - s.beta2) * square
        return m, v, m / (v.sqrt() + s.tau)


@algorithm(
    "fedopt",
    "FedOpt: the server's Adam, Yogi, Adagrad or momentum on the clients' mean move",
    "Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv 2003.00295",
)
class FedOpt(ServerOptimizer):
    """The server's optimizer on the clients' mean move."""

    needs_only_mean = True
    Settings = FedOptSettings
    settings: FedOptSettings

    def broadcast(self, state: State, client: int) -> Params:
        """The stepped params; in the published code's form the plain average in their place."""
        own = {name: value for name, value in super().broadcast(state, client).items() if self.is_personal(name)}
        return {**state.params, **state.memory.get(AVERAGE, {}), **own}

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """One step of the server's optimizer along Δ_t; personal tensors are averaged, for scoring only."""
        average = weighted_mean([update.params for update in updates], [update.samples for update in updates])
        after = self.stepped(state, average, lambda name: average[name] - state.params[name])
        if self.settings.form == "reference":
            kept = {name: average[name] for name in after.memory["first"]}
            after = replace(after, memory={**after.memory, AVERAGE: kept})
        return self.remember(after, updates), {}
