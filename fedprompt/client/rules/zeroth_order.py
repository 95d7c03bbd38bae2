"""Zeroth-order local rules: they ask for losses alone, as of a model that answers and gives no gradient.

φ: all that a client trains, L: the loss on its current batch, i = 1, 2, ...: the client's steps over all its rounds.

    a_i = a / (i + o)^α        c_i = c / i^γ                                          gains; a is the learning rate
    spsa:      ĝ(φ) = (L(φ + c_i Δ) − L(φ − c_i Δ)) / (2 c_i) · Δ^{-1}                Δ uniform in [−1, −½] ∪ [½, 1]
               φ ← φ − a_i ĝ(φ)
    spsa-gc:   m ← β m − a_i ĝ(φ + β m),   φ ← φ + m                                  gradient correction
    rgf:       ĝ(φ) = (L(φ + c_i u) − L(φ)) / c_i · u,   φ ← φ − a_i ĝ(φ)             u standard normal
    cma:       CMA-ES with a diagonal covariance (package ``cma``), anew in every round, with a for its first step size

Δ^{-1} is element by element; ĝ is the mean over ``draws`` directions; the gradient of what a client itself adds to its
loss, a proximal term, is known and added to ĝ. SPSA: Spall 1992. Gradient correction, Δ and the
gains: Oh et al., BlackVIP, CVPR 2023. RGF: Nesterov & Spokoiny 2017. CMA-ES: Hansen & Ostermeier 2001; diagonal: Ros &
Hansen 2008. Directions are drawn from a generator of each client's own, so nothing depends on who trains beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedprompt.client.rules.base import LocalOptions, LocalRule, Oracle, Slots
from fedprompt.client.rules.registry import local_rule
from fedprompt.errors import InputError
from fedprompt.models.params import Params, row

COUNT, MOMENTUM = "count", "momentum."  # in what stays with a client: i, and m by the names of the params
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


class SPSA(LocalRule):
    """SPSA, with gradient correction where ``momentum`` β > 0. i and m stay with the client from round to round."""

    def __init__(self, options: LocalOptions, momentum: float) -> None:
        self._options, self._gains, self._momentum = options, options.zeroth, momentum

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        clients, like = len(next(iter(params.values()))), next(iter(params.values()))
        count = kept[COUNT].clone() if COUNT in kept else like.new_zeros(clients)
        momentum = {n: kept.get(MOMENTUM + n, torch.zeros_like(v)).clone() for n, v in params.items()}
        return {COUNT: {COUNT: count}, MOMENTUM: momentum if self._momentum else {}}

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        i = slots[COUNT][COUNT] + 1
        gains = self._gains
        c = gains.c / i**gains.gamma  # [C]
        ahead = {n: value + self._momentum * slots[MOMENTUM].get(n, 0) for n, value in params.items()}
        losses, estimate = self._mean_estimate(ahead, c, oracle)
        _, known = oracle.added(ahead)
        stepped, momentum = {}, {}
        for name, value in params.items():
            a = _rows(self._options.rate(name) / (i + gains.offset) ** gains.alpha, value)
            move = self._momentum * slots[MOMENTUM].get(name, 0) - a * (estimate[name] + known.get(name, 0))
            stepped[name] = value + move
            momentum[name] = move
        return stepped, {**slots, COUNT: {COUNT: i}, MOMENTUM: momentum if self._momentum else {}}, losses

    def finish(self, params: Params, slots: Slots, steps: int) -> tuple[Params, Params]:
        return {}, {**slots[COUNT], **{MOMENTUM + name: value for name, value in slots[MOMENTUM].items()}}

    def _mean_estimate(self, params: Params, c: Tensor, oracle: Oracle) -> tuple[Tensor, Params]:
        """Mean loss [C] of what was asked, and ĝ {name: [C, ...]}."""
        draws = self._gains.draws
        losses, total = torch.zeros_like(c), {name: torch.zeros_like(value) for name, value in params.items()}
        for _ in range(draws):
            now, estimate = self._estimate(params, c, oracle)
            losses += now / draws
            for name, value in estimate.items():
                total[name] += value / draws
        return losses, total

    def _estimate(self, params: Params, c: Tensor, oracle: Oracle) -> tuple[Tensor, Params]:
        delta = directions(params, oracle.rngs, _away_from_zero)
        above, below = (oracle.loss(_moved(params, sign * c, delta)) for sign in (1, -1))
        slope = (above - below) / (2 * c)
        return (above + below) / 2, {name: _rows(slope, value) / value for name, value in delta.items()}


@local_rule(
    "spsa",
    "SPSA: two-sided differences along random directions",
    lr=4e-3,
    prompt_lr=4e-3,
    needs_gradients=False,
    source="Spall, IEEE TAC 1992",
)
def spsa(options: LocalOptions) -> LocalRule:
    """SPSA without gradient correction."""
    return SPSA(options, momentum=0.0)


@local_rule(
    "spsa-gc",
    "SPSA with gradient correction",
    lr=5e-4,
    prompt_lr=5e-4,
    needs_gradients=False,
    source="Oh et al., BlackVIP, CVPR 2023",
)
def spsa_gc(options: LocalOptions) -> LocalRule:
    """SPSA with gradient correction, of weight ``blackbox.beta``."""
    return SPSA(options, momentum=options.zeroth.beta)


@local_rule(
    "rgf",
    "random gradient-free estimation: one-sided differences along Gaussian directions",
    lr=4e-3,
    prompt_lr=4e-3,
    needs_gradients=False,
    source="Nesterov & Spokoiny, Found. Comput. Math. 2017",
)
class RGF(SPSA):
    """Random gradient-free estimation: one-sided differences along Gaussian directions."""

    def __init__(self, options: LocalOptions) -> None:
        super().__init__(options, momentum=0.0)

    def _mean_estimate(self, params: Params, c: Tensor, oracle: Oracle) -> tuple[Tensor, Params]:
        self._here = oracle.loss(params)  # once for all directions
        return self._here, super()._mean_estimate(params, c, oracle)[1]

    def _estimate(self, params: Params, c: Tensor, oracle: Oracle) -> tuple[Tensor, Params]:
        u = directions(params, oracle.rngs, lambda rng, shape: rng.standard_normal(shape))
        slope = (oracle.loss(_moved(params, c, u)) - self._here) / c
        return self._here, {name: _rows(slope, value) * value for name, value in u.items()}


@local_rule(
    "cma",
    "CMA-ES with a diagonal covariance",
    lr=0.02,
    prompt_lr=0.02,
    needs_gradients=False,
    source="Hansen & Ostermeier, Evol. Comput. 2001; Ros & Hansen, PPSN 2008",
)
class CMA(LocalRule):
    """CMA-ES with a diagonal covariance; a step asks for the losses of one population and goes to the new mean."""

    def __init__(self, options: LocalOptions) -> None:
        try:
            import cma
        except ImportError:
            raise InputError(
                "local.optimizer: 'cma' needs the package cma, which is not installed; allowed: pip install cma "
                "(fedprompt[cma]), or spsa-gc, spsa, rgf"
            ) from None
        self._search, self._options = cma.CMAEvolutionStrategy, options
        self._searches: list[Any] = []

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        self._searches = []  # made at the first step, which is when the clients' generators are there
        return {}

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        clients = len(oracle.rngs)
        if not self._searches:
            self._searches = [self._begin(row(params, i), rng) for i, rng in enumerate(oracle.rngs)]
        searches = self._searches[:clients]
        asked = np.stack([search.ask() for search in searches])  # [C, population, n]
        candidates = [_unflattened(asked[:, i], params) for i in range(asked.shape[1])]
        losses = torch.stack([oracle.loss(candidate) for candidate in candidates], dim=1)
        whole = losses + torch.stack([losses.new_zeros(clients) + oracle.added(each)[0] for each in candidates], dim=1)
        for search, points, values in zip(searches, asked, whole.tolist(), strict=True):
            search.tell(list(points), values)
        return _unflattened(np.stack([search.mean for search in searches]), params), slots, losses.mean(1)

    def _begin(self, start: Params, rng: np.random.Generator) -> Any:
        flat = torch.cat([value.flatten() for value in start.values()]).double().numpy()
        rate = self._options.rate(next(iter(start)))
        own = {"CMA_diagonal": True, "randn": lambda *shape: rng.standard_normal(shape), "seed": np.nan, "verbose": -9}
        return self._search(flat, rate, own)


def directions(params: Params, rngs: list[np.random.Generator], draw: Draw) -> Params:
    """Draw for every client from its own generator, in the order of the names: {name: [C, ...]}."""
    drawn = {name: [] for name in params}
    for rng in rngs:
        for name, value in params.items():
            drawn[name].append(draw(rng, tuple(value.shape[1:])))
    return {name: torch.from_numpy(np.stack(rows)).to(params[name]) for name, rows in drawn.items()}


def _away_from_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in [−1, −½] ∪ [½, 1]: its inverse is bounded, and its mean 0."""
    return rng.uniform(0.5, 1, shape) * rng.choice((-1.0, 1.0), shape)


def _moved(params: Params, c: Tensor, along: Params) -> Params:
    return {name: value + _rows(c, value) * along[name] for name, value in params.items()}


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """One number per client [C], in the shape that multiplies [C, ...]."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _unflattened(flat: np.ndarray, like: Params) -> Params:
    """Split rows [C, n] into {name: [C, ...]}."""
    sizes = [value[0].numel() for value in like.values()]
    parts = torch.from_numpy(np.ascontiguousarray(flat)).split(sizes, dim=1)
    return {name: part.to(value).reshape(-1, *value.shape[1:]) for (name, value), part in zip(like.items(), parts)}
