"""SCAFFOLD on prompts (SCAFFOLD-PT).

S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh: SCAFFOLD: Stochastic Controlled Averaging
for Federated Learning. ICML 2020, arXiv 1910.06378. Algorithm 1 with option II; client i of the cohort S, of N clients:

    y_i ← x;  K times:  y_i ← y_i − η (g_i(y_i) − c_i + c)
    c_i⁺ = c_i − c + (x − y_i) / (K η);   sends (Δy_i, Δc_i) = (y_i − x, c_i⁺ − c_i)
    server:  x ← x + η_g / |S| Σ Δy_i,    c ← c + 1/N Σ Δc_i

Controls start at zero; a client keeps its own from one participation to the next. The average over the cohort is
uniform, as in the paper. Personal tensors take plain SGD steps.

``form = reference`` is the form in the published code of the PFPT study (Weng et al., NeurIPS 2024): a client starts
from x as the round of its own last participation left it, instead of from today's; Δy_i is its move from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms.base import Algorithm, MethodSettings, Metrics, Rate, State
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.base import LocalOptions, LocalRule, Oracle, Slots
from fedprompt.client.tasks import Update
from fedprompt.models.params import Params, weighted_mean


class ScaffoldSettings(MethodSettings):
    """``server_lr``: η_g. ``form``: the paper's, or the study's published code's."""

    server_lr: Rate = 1.0
    form: Literal["paper", "reference"] = "paper"


@algorithm(
    "scaffold",
    "SCAFFOLD: control variates against client drift, with local SGD",
    "Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020, arXiv 1910.06378",
)
class Scaffold(Algorithm):
    """Controlled averaging: the server's control c is in the state's memory, a client's c_i in its store."""

    optimizers = ("sgd",)
    takes_momentum = False
    Settings = ScaffoldSettings
    settings: ScaffoldSettings

    def init(self, params: Params, rng: np.random.Generator) -> State:
        """x as drawn and c = 0."""
        state = super().init(params, rng)
        shared = {name: value for name, value in params.items() if self.travels(name)}
        return replace(state, memory={**state.memory, "control": {n: torch.zeros_like(v) for n, v in shared.items()}})

    def send(self, state: State, client: int) -> Params:
        """The server's control c."""
        return state.memory["control"]

    def rule(self, options: LocalOptions, round: int) -> LocalRule:
        """SGD with control variates."""
        return ControlledSGD(options)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """x ← x + η_g mean Δy,  c ← c + |S| / N mean Δc; personal tensors are averaged, for scoring only."""
        uniform = [1.0] * len(updates)
        starts = weighted_mean([self.broadcast(state, update.client) for update in updates], uniform)
        ends = weighted_mean([update.params for update in updates], uniform)
        controls = weighted_mean([update.reply for update in updates], uniform)
        rate, share = self.settings.server_lr, len(updates) / self.setting.clients
        moved = {n: x + rate * (ends[n] - starts[n]) for n, x in state.params.items() if self.travels(n)}
        control = {name: c + share * controls[name] for name, c in state.memory["control"].items()}
        state = replace(state, params={**ends, **moved}, memory={**state.memory, "control": control})
        norm = sum(float(c.double().square().sum()) for c in control.values()) ** 0.5
        return self.remember(state, updates), {"control_norm": norm}

    def remember(self, state: State, updates: Sequence[Update]) -> State:
        """In the published code's form a client also keeps the x that its round ends with."""
        state = super().remember(state, updates)
        if self.settings.form == "paper":
            return state
        shared = {name: x for name, x in state.params.items() if self.travels(name)}
        stores = {update.client: {**state.clients[update.client], **shared} for update in updates}
        return replace(state, clients={**state.clients, **stores})


class ControlledSGD(LocalRule):
    """y ← y − η (g − c_i + c), and at the end the client's next control."""

    def __init__(self, options: LocalOptions) -> None:
        self._options = options

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        shared = {name: c for name, c in sent.items() if name in params}
        own = {name: kept.get(name, torch.zeros_like(c)) for name, c in shared.items()}
        return {"server": shared, "own": own, "start": {name: params[name].clone() for name in shared}}

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        losses, moves = oracle.grad(params)
        for name, control in slots["server"].items():
            moves[name] = moves[name] - slots["own"][name] + control
        return {n: value - self._options.rate(n) * moves[n] for n, value in params.items()}, slots, losses

    def finish(self, params: Params, slots: Slots, steps: int) -> tuple[Params, Params]:
        """Δc_i to the server; c_i⁺ stays."""
        change = {
            name: (start - params[name]) / (steps * self._options.rate(name)) - slots["server"][name]
            for name, start in slots["start"].items()
        }
        return change, {name: slots["own"][name] + delta for name, delta in change.items()}
