"""Set aggregation around the pool that was sent, in closed form: many clients' prompt sets become the next pool.

The server step of ``pfpt_map.py``; there is no published form. Client t of C sends p_tj (j = 1..n), its version of the
sent prompt φ_j, and counts by its number of samples, ω_t = n_t / mean(n). All spreads are the same in every coordinate:

    θ_k ~ N(φ_k, τ²) for the n sent prompts,   θ_k ~ N(m0, τ0²) for new ones (m0, τ0²: mean and variance of all φ)
    p_tj | z_tjk = 1 ~ N(θ_k, s²), counted ω_t times;   c_tk = Σ_j z_tjk ~ Bernoulli(π_k), π_k ~ Beta(a, a)

Given the others' assignments z, everything else is integrated out: with U_k users, Ω_k = Σ ω_t and S_k = Σ ω_t p_tj
over the prompts matched to k,

    v_k = 1 / (1/τ_k² + Ω_k/s²),    m_k = v_k (prior mean / τ_k² + S_k / s²)                    τ_k = τ or τ0
    W_tjk = ζ log N(p_tj; m_k, s² + v_k) + log (U_k + a) / (C − 1 − U_k + a)     k sent, or opened and in use
    W_tjk = ζ log N(p_tj; m0, s² + τ0²) + log γ / C                              k new

(nothing of client t's own is in U, Ω, S). From z_tj = j, where every client started, each client in turn is
taken out, matched anew one-to-one by the largest Σ W, and put back, until no match changes. The odds are those of the
Beta-Bernoulli matching of neurons (Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, ICML
2019). After a sweep the spreads are estimated anew by moments, with m̄_k = S_k / Ω_k and Q_k = Σ ω_t² over k's users:

    s² = Σ_tj ω_t |p_tj − m̄_z|² / (D Σ_k (Ω_k − Q_k / Ω_k)), at least 1e-4 τ0²
    τ² = mean over sent k of (|m̄_k − φ_k|² / D − s² Q_k / Ω_k²), at least s²

τ² is bounded by s² because clients that pull in nearly orthogonal directions would make it 0, and the pool stand still:
so a sent prompt counts for one client at most. The new pool is the m_k of what is in use; as τ² → ∞ it is the average
slot by slot, by samples, while nobody leaves his slot.

When does a prompt leave its slot? With q = |p − m_k|² / D, A = s² + v_k, r = |p − m0|² / D, B = s² + τ0², for a new one
if

    q/A − r/B > log(B/A) + 2 / (ζ D) · (log odds_k + log C/γ)

At ζ = 1 and D = 384 the prior says next to nothing, the bound is sharp, and low: with C = 5, τ0 = 0.05 and r = τ0² + q
a prompt leaves at 2.3, 1.8 and 1.6 times the typical distance √A for s = 0.005, 0.02 and 0.05. Independent moves of one
length never get there. But clients move their prompts by different lengths, in all coordinates at once, so that these
are no D independent witnesses; and each that leaves lowers s² for the others. (20 prompts, 10 clients, moves of RMS
0.05 times a factor uniform in 0 to 2: 93 new prompts.) So the likelihood is tempered (a coarsened posterior; Miller and
Dunson, Robust Bayesian Inference via Coarsening, JASA 2019), ζ = 1 / (1 + D / ``evidence``): D coordinates weigh like
``evidence`` of them, and the prior has a say. With 10 the bounds are 2.5, 2.0 and 2.0, and the 93 are none.

For the same reason ω_t counts observations and is not their precision: clients with more samples make more steps and
move farther. Expected within s² / ω_t of the mean, they left for that alone (moves of a real run, enlarged to RMS 0.02:
up to 30 new prompts of 19; to RMS 0.04: up to 39).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms.pfpt.set_aggregation import SetAggregation, check_sets, keep_used, match

LEAST_NOISE = 1e-4  # of s², relative to τ0²: where clients agree exactly, s is a hundredth of the prompts' spread


@dataclass(frozen=True)
class MapOptions:
    """γ, a, the number of coordinates that all D weigh like, and how many sweeps there are at most."""

    gamma: float = 1.0
    concentration: float = 1.0
    evidence: float = 10.0
    sweeps: int = 10


@dataclass(frozen=True)
class Spreads:
    """The variances of the model."""

    noise: float  # s²
    drift: float  # τ²
    prior: float  # τ0²


@dataclass
class Slots:
    """What is matched to every candidate: first the n sent prompts, then room for as many new ones as there can be."""

    users: np.ndarray  # U, int [K]
    total: np.ndarray  # Ω, [K]
    squares: np.ndarray  # Q, [K]
    sums: np.ndarray  # S, [K, D]

    def put(self, prompts: np.ndarray, weight: float, places: np.ndarray, sign: int = 1) -> None:
        """Add one client's prompts [n, D] at its places [n]; ``sign = -1`` takes them out again."""
        self.users[places] += sign
        self.total[places] += sign * weight
        self.squares[places] += sign * weight**2
        self.sums[places] += sign * weight * prompts
        if sign < 0:  # no rounding errors where nothing is left
            left = places[self.users[places] == 0]
            self.total[left] = self.squares[left] = self.sums[left] = 0


def aggregate_around(
    sent: Tensor, sets: Tensor, samples: Sequence[float], options: MapOptions, max_size: int | None = None
) -> SetAggregation:
    """Match the clients' prompt sets [C, n, D] to the ``sent`` prompts [n, D] and to each other; return the next pool.

    Computes in float64 on the CPU; deterministic. ``max_size`` keeps the candidates with the most clients.

    Metrics: ``pool_size``, ``clients_per_candidate``, ``drift``, ``drift_relative`` and ``changed`` as in PFPT's set
    aggregation; ``opened`` (prompts of the pool that are new), ``closed`` (sent ones that are no more), ``s``, ``tau``
    (the estimates that the pool is made with), and ``sweeps`` (that it took).

    Raises InputError if ``max_size`` is below 1, ValueError if ``sets`` has no prompt or one that is not finite.
    """
    check_sets(sets, max_size)
    phi, own = (value.detach().cpu().double().numpy() for value in (sent, sets))
    weights = np.asarray(samples, dtype=float) / np.mean(samples)
    assignment, spreads, told = fit(phi, own, weights, options)
    slots = filled(own, weights, assignment)
    means, _ = posterior(prior_means(phi, len(slots.users)), slots, spreads, np.arange(len(slots.users)), len(phi))
    candidates, kept = keep_used(
        torch.from_numpy(means).to(sets), sets.detach(), torch.from_numpy(assignment).to(sets.device), max_size
    )
    opened = int((candidates >= len(phi)).sum())
    pool = {"opened": float(opened), "closed": float(len(phi) - (len(candidates) - opened))}
    estimates = {"s": math.sqrt(spreads.noise), "tau": math.sqrt(spreads.drift)}
    return replace(kept, metrics={**kept.metrics, **pool, **estimates, **told})


def fit(
    phi: np.ndarray, sets: np.ndarray, weights: np.ndarray, options: MapOptions
) -> tuple[np.ndarray, Spreads, dict[str, float]]:
    """Coordinate ascent: the assignment [C, n] to candidates, the spreads, and how it ended."""
    clients, prompts, _ = sets.shape
    assignment = np.tile(np.arange(prompts), (clients, 1))
    slots = filled(sets, weights, assignment)
    spreads = estimated(phi, sets, weights, assignment, slots)
    changed, sweeps = 1.0, 0
    while changed and sweeps < options.sweeps:
        before = assignment.copy()
        for t, own in enumerate(sets):
            slots.put(own, weights[t], assignment[t], sign=-1)
            assignment[t] = rematched(phi, own, slots, spreads, clients, options)
            slots.put(own, weights[t], assignment[t])
        slots = filled(sets, weights, assignment)  # without the rounding errors of what was taken out and put back
        spreads = estimated(phi, sets, weights, assignment, slots)
        changed, sweeps = float((assignment != before).mean()), sweeps + 1
    return assignment, spreads, {"changed": changed, "sweeps": float(sweeps)}


def filled(sets: np.ndarray, weights: np.ndarray, assignment: np.ndarray) -> Slots:
    """The slots under an assignment [C, n] of sets [C, n, D]: K = n + C·n of them."""
    clients, prompts, width = sets.shape
    size = prompts * (1 + clients)
    slots = Slots(np.zeros(size, dtype=int), np.zeros(size), np.zeros(size), np.zeros((size, width)))
    for own, weight, places in zip(sets, weights, assignment, strict=True):
        slots.put(own, weight, places)
    return slots


def prior_means(phi: np.ndarray, size: int) -> np.ndarray:
    """Where candidates are expected before anything is matched to them, [K, D]: φ_k, and m0 for new ones."""
    return np.concatenate([phi, np.broadcast_to(phi.mean(0), (size - len(phi), phi.shape[1]))])


def posterior(
    expected: np.ndarray, slots: Slots, spreads: Spreads, columns: np.ndarray, prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """m [K', D] and v [K'] of the candidates in ``columns``; the first ``prompts`` candidates are the sent ones."""
    before = np.where(columns < prompts, spreads.drift, spreads.prior)
    variance = 1 / (1 / before + slots.total[columns] / spreads.noise)
    pulled = expected / before[:, None] + slots.sums[columns] / spreads.noise
    return variance[:, None] * pulled, variance


def rematched(
    phi: np.ndarray, own: np.ndarray, slots: Slots, spreads: Spreads, clients: int, options: MapOptions
) -> np.ndarray:
    """The best places [n] for a client's prompts [n, D], with the slots as the other clients fill them."""
    prompts, width = own.shape
    unused = slots.users[prompts:] == 0
    opened, new = prompts + np.flatnonzero(~unused), prompts + np.flatnonzero(unused)[:prompts]
    columns = np.concatenate([np.arange(prompts), opened, new[:1]])  # all new ones are alike
    expected = np.concatenate([phi, np.broadcast_to(phi.mean(0), (len(opened) + 1, width))])
    means, variances = posterior(expected, slots, spreads, columns, prompts)
    spread = spreads.noise + variances
    distance = np.square(own).sum(1)[:, None] + np.square(means).sum(1) - 2 * own @ means.T
    likelihood = -0.5 * (width * np.log(2 * math.pi * spread) + distance.clip(min=0) / spread)
    users, a = slots.users[columns], options.concentration
    odds = np.log((users + a) / (clients - 1 - users + a))
    odds[-1] = math.log(options.gamma / clients)
    gains = likelihood / (1 + width / options.evidence) + odds
    gains = np.concatenate([gains, np.repeat(gains[:, -1:], prompts - 1, axis=1)], axis=1)
    return np.concatenate([columns[:-1], new])[match(gains)]


def estimated(phi: np.ndarray, sets: np.ndarray, weights: np.ndarray, assignment: np.ndarray, slots: Slots) -> Spreads:
    """The variances by moments. Where every prompt is alone, s² and τ² share equally what prompts have moved."""
    prompts, width = phi.shape
    prior = float(np.square(phi - phi.mean(0)).mean()) if prompts > 1 else float(np.square(phi).mean())
    used = np.flatnonzero(slots.users)
    means = np.zeros_like(slots.sums)
    means[used] = slots.sums[used] / slots.total[used, None]
    sent = used[used < prompts]
    moved = float(np.square(means[sent] - phi[sent]).mean()) if len(sent) else 0.0
    shared = float((slots.squares[sent] / slots.total[sent] ** 2).mean()) if len(sent) else 1.0
    if slots.users.max() > 1:
        within = float(weights @ np.square(sets - means[assignment]).sum((1, 2))) / width
        noise = within / float((slots.total[used] - slots.squares[used] / slots.total[used]).sum())
    else:
        noise = moved / (1 + shared)
    noise = max(noise, LEAST_NOISE * (prior or 1.0))
    return Spreads(noise, max(noise, moved - noise * shared), prior or 1.0)
