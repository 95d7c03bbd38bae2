"""pFedPG: a server that generates every client's prompts.

F.-E. Yang, C.-Y. Wang, Y.-C. F. Wang: Efficient Model Personalization in Federated Learning via Client-Specific Prompt
Generation. ICCV 2023, arXiv 2308.15367. The server owns a generator with a learned descriptor d_t for each client:

    prompt_t = P + W_o Attn(q = d_t W_q, K = P W_k, V = P W_v)          P [L, D] the base prompts

Client t tunes the prompts that it is sent, and a head of its own that never leaves it and keeps its optimizer; it sends
the prompts back. Their move is the gradient with respect to the generator's output, so the generator θ (d_t included)
steps along the vector–Jacobian product

    θ ← θ − η_s (∂ prompt_t / ∂θ)ᵀ (sent_t − returned_t)

``schedule = client`` makes one such step per client, in turn, as published; ``cohort`` one along the cohort's mean.
On the prompt pool the generator makes every client's pool, and ``query_proj`` is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms.base import Algorithm, MethodSettings, Metrics, Rate, State
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.base import LocalOptions, LocalRule, Slots
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.rules.wrappers import WrappedRule
from fedprompt.client.tasks import Update
from fedprompt.models.params import HEAD, Params, weighted_mean

GENERATED = ("prompt", "pool")


class PFedPGSettings(MethodSettings):
    """``server_lr``: η_s. ``schedule``: one server step per client, or one per cohort."""

    server_lr: Rate = 0.2
    schedule: Literal["client", "cohort"] = "client"


@algorithm(
    "pfedpg",
    "pFedPG: the server's generator makes every client's prompts, heads stay at home",
    "Yang et al., Efficient Model Personalization in FL via Client-Specific Prompt Generation, ICCV 2023",
)
class PFedPG(Algorithm):
    """Generated prompts and personal heads: the global params are for show, every client is scored with its own."""

    kinds = GENERATED
    Settings = PFedPGSettings
    settings: PFedPGSettings

    def is_personal(self, name: str) -> bool:
        """Prompts are the client's own, made for it; so is its head."""
        return name in GENERATED or name.startswith(HEAD)

    def travels(self, name: str) -> bool:
        """Prompts go to the client and back; the head stays."""
        return not name.startswith(HEAD) and not self.is_constant(name)

    def init(self, params: Params, rng: np.random.Generator) -> State:
        """P as the prompts were drawn, W uniform in ±1/√D, descriptors from a standard normal distribution."""
        state = super().init(params, rng)
        base = params[_generated(params)]
        width = base.shape[1]
        draw = {n: rng.uniform(-1, 1, (width, width)) / math.sqrt(width) for n in ("query", "key", "value", "out")}
        draw["descriptors"] = rng.normal(size=(self.setting.clients, width))  # [N, D]
        generator = {"base": base, **{name: torch.from_numpy(value).to(base.dtype) for name, value in draw.items()}}
        return replace(state, memory={**state.memory, "generator": generator})

    def broadcast(self, state: State, client: int) -> Params:
        """The client's generated prompts, what is shared, and its own head."""
        made = generate(state.memory["generator"], client)
        return {**super().broadcast(state, client), _generated(state.params): made}

    def rule(self, options: LocalOptions, round: int) -> LocalRule:
        """The configuration's optimizer, whose state for the head stays with the client."""
        return KeepsHead(make_rule(options))

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Step the generator, average what else there is, and show the mean of all clients' next prompts."""
        name = _generated(state.params)
        generator = state.memory["generator"]
        moves = {u.client: generate(generator, u.client) - u.params[name] for u in updates}  # sent − returned
        turns = [[client] for client in moves] if self.settings.schedule == "client" else [list(moves)]
        for clients in turns:
            products = [generator_gradient(generator, client, moves[client]) for client in clients]
            mean = weighted_mean(products, [1.0] * len(products))
            generator = {n: value - self.settings.server_lr * mean[n] for n, value in generator.items()}
        params = weighted_mean([update.params for update in updates], [update.samples for update in updates])
        made = torch.stack([generate(generator, client) for client in range(self.setting.clients)])
        params[name] = made.mean(0)
        metrics = {
            "prompt_spread_relative": float((made - params[name]).square().mean().sqrt() / made.square().mean().sqrt())
        }
        state = replace(state, params=params, memory={**state.memory, "generator": generator})
        return self.remember(state, updates), metrics


def generate(generator: Params, client: int) -> Tensor:
    """Prompts [L, D] of one client: the base prompts, all moved by what its descriptor attends to among them."""
    base = generator["base"]
    query = generator["descriptors"][client] @ generator["query"]  # [D]
    attention = torch.softmax(base @ generator["key"] @ query / math.sqrt(base.shape[1]), dim=0)  # [L]
    return base + attention @ (base @ generator["value"]) @ generator["out"]


def generator_gradient(generator: Params, client: int, cotangent: Tensor) -> Params:
    """(∂ prompt_t / ∂θ)ᵀ · cotangent [L, D], for every tensor of the generator."""
    leaves = {name: value.detach().requires_grad_() for name, value in generator.items()}
    grads = torch.autograd.grad(generate(leaves, client), list(leaves.values()), cotangent)
    return dict(zip(leaves, grads, strict=True))


def _generated(params: Params) -> str:
    return next(name for name in GENERATED if name in params)


class KeepsHead(WrappedRule):
    """Another rule whose slots for the head stay with the client until it takes part again."""

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        slots = self._inner.start(params, sent, kept)
        return {slot: {n: kept.get(f"{slot}.{n}", v) for n, v in values.items()} for slot, values in slots.items()}

    def finish(self, params: Params, slots: Slots, steps: int) -> tuple[Params, Params]:
        """Moments and counts of the head stay, beside what the inner rule leaves."""
        sent, kept = self._inner.finish(params, slots, steps)
        head = {f"{slot}.{n}": v for slot, values in slots.items() for n, v in values.items() if n.startswith(HEAD)}
        return sent, {**kept, **head}
