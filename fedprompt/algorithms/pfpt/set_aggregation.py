"""Generative set aggregation: many clients' prompt sets become one pool of summarizing prompts (PFPT's server step).

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS 2024, arXiv 2502.19752;
the model and its objective stand in :mod:`fedprompt.algorithms.pfpt.generative_model`, the matching weights W are
computed in :mod:`fedprompt.algorithms.pfpt.evidence`.

The candidates φ start at all K = C·n local prompts, every client's assignment at n random distinct candidates. A sweep
of the schedule ``sequential`` does for each client in turn

    W_t from the current parameters -> one Adam step on client t's objective alone, at its current z_t
    -> z_t = the one-to-one assignment that maximises Σ_jk z_tjk W_tjk, with the W_t from *before* the step

and ``joint`` does the same once per sweep with all clients as one: one step on the sum, then all matchings, again from
the weights before the step. Adam is torch's (β = 0.9, 0.999) and dense: one state for φ and both nets, so its momentum
moves candidates that nobody matched. The pool is the candidates that someone uses after the last sweep, in index order.

What the paper leaves open is settled so: objectives are sums (not means) over prompts and clients; under
``prior="odds"`` a client's objective holds the terms of all K candidates, also those it does not use; matchings are
computed by scipy in float64, and equal ones fall as its algorithm visits them, by index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedprompt.algorithms.pfpt import generative_model as model
from fedprompt.algorithms.pfpt.evidence import Evidence, evidence, weigh
from fedprompt.errors import InputError, did_you_mean

Schedule = Literal["sequential", "joint"]


@dataclass(frozen=True)
class GenerativeSettings:
    """How the generative model is fitted. Raises InputError if a value is not allowed."""

    schedule: Schedule = "sequential"
    prior: model.Prior = "odds"
    sweeps: int = 50
    lr: float = 1e-3
    hidden: int = 128

    def __post_init__(self) -> None:
        for key, allowed in (("schedule", get_args(Schedule)), ("prior", get_args(model.Prior))):
            value = getattr(self, key)
            if value not in allowed:
                hint = did_you_mean(str(value), allowed)
                raise InputError(f"{key}: {value!r} is not allowed, only {' or '.join(allowed)}{hint}")
        for key, least in (("sweeps", 1), ("hidden", 1)):
            if getattr(self, key) < least:
                raise InputError(f"{key}: {getattr(self, key)} is not allowed, it must be at least {least}")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"lr: {self.lr} is not allowed, it must be a positive number")


@dataclass(frozen=True)
class SetAggregation:
    """The new pool, who is matched to what in it, and diagnostics."""

    pool: Tensor  # [K', D] candidates that anyone uses, in candidate index order
    assignment: (
        Tensor  # int64 [C, n]: row of the pool that client t's prompt j is matched to, -1 if that one was dropped
    )
    metrics: dict[str, float]


def aggregate_sets(
    sets: Tensor, settings: GenerativeSettings, rng: np.random.Generator, max_size: int | None = None
) -> SetAggregation:
    """Fit the generative model to the clients' prompt sets [C, n, D] and return the candidates that are in use.

    Computes on the device and in the precision of ``sets``; only the assignments are solved on the CPU. The result is a
    function of ``sets``, ``settings`` and the state of ``rng`` (which draws first the nets, then the start of z).

    ``max_size`` keeps the candidates with the most clients (ties: lower index); prompts of the others get -1.

    Metrics: ``pool_size``; ``clients_per_candidate`` (mean over the pool); ``log_likelihood`` (mean over matched
    pairs); ``margin`` (mean of matched weight minus the best other weight of the same prompt, which may be taken and
    larger; 0 if there is one candidate only); ``drift`` (RMS of pool prompt minus the mean of the local prompts matched
    to it) and ``drift_relative`` (divided by the RMS of all local prompts); ``sigma_min`` (over the pool); ``changed``
    (share of assignments that the last sweep changed); ``objective`` (of all clients, with the final parameters).
    Log-likelihood, margin and objective are taken before ``max_size`` drops candidates.

    Raises InputError if ``max_size`` is below 1, ValueError if ``sets`` has no prompt or one that is not finite.
    """
    check_sets(sets, max_size)
    with torch.no_grad():
        sets = sets.detach()
        parameters, assignment, changed = fit(sets, settings, rng)
        candidates, kept = keep_used(parameters["phi"], sets, assignment, max_size)
        nets = model.forward(parameters, settings.prior)
        metrics = _fit_metrics(parameters, nets, sets, assignment, settings.prior) | kept.metrics
        metrics["sigma_min"] = nets.sigma[candidates].min().item()
        metrics["changed"] = changed
    return replace(kept, metrics=metrics)


def check_sets(sets: Tensor, max_size: int | None) -> None:
    """Raise InputError if ``max_size`` is below 1, ValueError if ``sets`` has no prompt or one that is not finite."""
    if max_size is not None and max_size < 1:
        raise InputError(f"max_size: {max_size} is not allowed, it must be at least 1")
    if sets.ndim != 3 or 0 in sets.shape or not torch.isfinite(sets).all():
        raise ValueError(f"sets must be finite and of shape [C, n, D] with C, n, D > 0, got {list(sets.shape)}")


def keep_used(phi: Tensor, sets: Tensor, assignment: Tensor, max_size: int | None) -> tuple[Tensor, SetAggregation]:
    """Keep of the candidates ``phi`` [K, D] those that ``assignment`` [C, n] uses, at most ``max_size``: the most used.

    Returns their indices, ascending, and the pool with what can be said of it without knowing how it was fitted.
    """
    candidates = _most_used(assignment, max_size)
    place = torch.full((len(phi),), -1, device=sets.device)
    place[candidates] = torch.arange(len(candidates), device=sets.device)
    pool, matched = phi[candidates].clone(), place[assignment]
    return candidates, SetAggregation(pool, matched, _pool_metrics(pool, sets, matched))


def mean_of_matched(sets: Tensor, assignment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means [size, D] of the local prompts [C, n, D] that are matched to each place of a pool, and how many [size].

    In float64; ``assignment`` [C, n] is -1 where a prompt was dropped. NaN where nothing is matched to a place.
    """
    one_hot = (assignment.reshape(-1, 1) == torch.arange(size, device=sets.device)).double()  # [C·n, size]
    users = one_hot.sum(0)
    return one_hot.T @ sets.flatten(0, 1).double() / users.unsqueeze(1), users


def match(weights: np.ndarray) -> np.ndarray:
    """Return the one-to-one assignment [n] of rows to columns with the largest sum of ``weights`` [n, K], n ≤ K.

    Raises FloatingPointError where weights are no numbers.
    """
    try:
        return linear_sum_assignment(weights, maximize=True)[1]
    except ValueError as error:  # NaN, or infinite where it would have to be chosen
        raise FloatingPointError(f"the weights of a matching ({error})") from error


def start(sets: Tensor, hidden: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Draw the start of a fit: the parameters (φ at all local prompts) and a random assignment [C, n]."""
    clients, prompts, width = sets.shape
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    parameters = model.initial_parameters(sets.reshape(-1, width), hidden, generator)
    drawn = [rng.choice(clients * prompts, prompts, replace=False) for _ in range(clients)]
    return parameters, torch.from_numpy(np.stack(drawn)).to(sets.device)


@torch.inference_mode()
def fit(
    sets: Tensor, settings: GenerativeSettings, rng: np.random.Generator
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Alternate steps and matchings; return the parameters, the assignment [C, n] and the share changed at last.

    In inference mode, which spares each of a step's many small operations a part of its cost: the tensors returned can
    be computed with, but not be learned from or changed outside of it.
    """
    clients, prompts, _ = sets.shape
    parameters, assignment = start(sets, settings.hidden, rng)
    step = _ascent(parameters, settings.lr)
    size = 1 if settings.schedule == "sequential" else clients
    seen = Evidence(sets, size, clients * prompts)
    previous = assignment
    for _ in range(settings.sweeps):
        previous = assignment.clone()
        for group, current in zip(sets.split(size), assignment.split(size), strict=True):
            nets = model.forward(parameters, settings.prior)
            seen.add(parameters["phi"], nets)
            step(model.gradient(parameters, nets, group, current, settings.prior))
            if seen.full:
                behind = seen.clients
                weights = weigh(*seen.take(), assignment[behind], settings.prior).cpu().numpy()
                assignment[behind] = torch.from_numpy(np.stack([match(own) for own in weights])).to(sets.device)
    return parameters, assignment, (assignment != previous).double().mean().item()


def _ascent(parameters: dict[str, Tensor], lr: float) -> Callable[[dict[str, Tensor]], None]:
    """Return a function that makes an Adam step of ``parameters`` up a gradient, which names the same at each call.

    The operation behind ``torch.optim.Adam(fused=True)``: what the class adds around it costs as much as the step.
    """
    means, squares = ({name: torch.zeros_like(own) for name, own in parameters.items()} for _ in range(2))
    steps = torch.zeros((), device=parameters["phi"].device)
    settings = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}

    def step(gradient: dict[str, Tensor]) -> None:
        steps.add_(1)
        lists = [[each[name] for name in gradient] for each in (parameters, gradient, means, squares)]
        torch._fused_adam_(*lists, [], [steps] * len(gradient), maximize=True, **settings)

    return step


def _most_used(assignment: Tensor, max_size: int | None) -> Tensor:
    """Return the indices of the candidates in use, ascending; the ``max_size`` with the most clients if more are."""
    candidates, users = torch.unique(assignment, return_counts=True)
    if max_size is None or len(candidates) <= max_size:
        return candidates
    kept = torch.sort(users, descending=True, stable=True).indices[:max_size]
    return candidates[kept.sort().values]


def _fit_metrics(
    parameters: dict[str, Tensor], nets: model.Forward, sets: Tensor, assignment: Tensor, prior: model.Prior
) -> dict[str, float]:
    """Return what the fitted model, whose outcome of ``forward`` are ``nets``, says about its matching."""
    likelihood, logit = evidence(sets, parameters["phi"], nets)
    weights = weigh(likelihood, logit, assignment, prior).flatten(0, 1)
    chosen = assignment.reshape(-1, 1)
    others = weights.scatter(1, chosen, -torch.inf).amax(1, keepdim=True)
    margin = (weights.gather(1, chosen) - others).mean().item() if weights.shape[1] > 1 else 0.0
    return {
        "log_likelihood": likelihood.flatten(0, 1).gather(1, chosen).mean().item(),
        "margin": margin,
        "objective": model.objective(parameters, sets, assignment, prior).item(),
    }


def _pool_metrics(pool: Tensor, sets: Tensor, assignment: Tensor) -> dict[str, float]:
    """Return the pool's size, use and distance from the local prompts matched to it."""
    means, users = mean_of_matched(sets, assignment, len(pool))
    drift = (pool - means).square().mean().sqrt().item()
    norm = sets.double().square().mean().sqrt().item()
    return {
        "pool_size": float(len(pool)),
        "clients_per_candidate": users.mean().item(),
        "drift": drift,
        "drift_relative": drift / norm if norm > 0 else 0.0,
    }
