"""Local rules that follow the gradient: SGD and Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.client.rules.base import LocalOptions, LocalRule, Oracle, Slots
from fedprompt.client.rules.registry import local_rule
from fedprompt.models.params import Params


@local_rule("sgd", "stochastic gradient descent, with local.momentum", lr=0.01, prompt_lr=0.1)
class SGD(LocalRule):
    """Stochastic gradient descent, with heavy-ball momentum where it is set: v ← m v + g, w ← w − lr v."""

    def __init__(self, options: LocalOptions) -> None:
        self.options = options

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        if not self.options.momentum:
            return {}
        return {"velocity": {name: torch.zeros_like(value) for name, value in params.items()}}

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        losses, moves = oracle.grad(params)
        if self.options.momentum:
            for name, velocity in slots["velocity"].items():
                moves[name] = velocity.mul_(self.options.momentum).add_(moves[name])
        stepped = {name: value - self.options.rate(name) * moves[name] for name, value in params.items()}
        return stepped, slots, losses


@local_rule("adam", "Adam", lr=5e-4, prompt_lr=1e-3, source="Kingma & Ba, ICLR 2015, arXiv 1412.6980")
class Adam(LocalRule):
    """Adam with bias correction (Kingma & Ba 2015, algorithm 1); every client has moments and a count of its own."""

    def __init__(self, options: LocalOptions) -> None:
        self.options = options

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        counts = {name: value.new_zeros(len(value), *(1,) * (value.ndim - 1)) for name, value in params.items()}
        return {"first": zeros, "second": {n: v.clone() for n, v in zeros.items()}, "count": counts}

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        losses, grads = oracle.grad(params)
        beta1, beta2 = self.options.betas
        stepped = {}
        for name, value in params.items():
            count = slots["count"][name].add_(1)
            first = slots["first"][name].lerp_(grads[name], 1 - beta1)
            second = slots["second"][name].mul_(beta2).addcmul_(grads[name], grads[name], value=1 - beta2)
            spread = (second / (1 - beta2**count)).sqrt_().add_(self.options.eps)
            rate = self.options.rate(name) / (1 - beta1**count)
            stepped[name] = value - rate * (first / spread)
        return stepped, slots, losses
