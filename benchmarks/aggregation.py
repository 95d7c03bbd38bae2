"""PFPT's server step against the straightforward form of the published one, on the same input, in turn.

The straightforward form is written for this comparison and goes the way of the published program: PyTorch modules and
autograd, for each candidate a normal and a Bernoulli distribution in a Python loop of its own, sums with the indicators
z, one Adam step and one matching per client, everything computed anew each time. It takes a minute, so each turn times
two of its sweeps and extrapolates. Both start from the same parameters and assignments; the assignments after those
sweeps must agree. ``joint`` is compared with the same slow form: it fits the same model in fewer, larger steps. All
this under the default prior, and under that of the published code (``reference``), whose gradient concerns fewer
candidates.

Then, how the cost of our own form grows with the number of clients C, prompts n and width D.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.nn.functional import one_hot

from benchmarks.turns import in_turn, ratio
from fedprompt.algorithms.pfpt.set_aggregation import GenerativeSettings, SetAggregation, aggregate_sets, fit, start
from fedprompt.programs import program

CLIENTS, PROMPTS, WIDTH, SWEEPS = 10, 20, 768, 50
SLOW_SWEEPS = 2
SCALE, NOISE = 0.05, 0.005  # of prompts, and of the clients' moves: what training makes of them
GROWTH = [(10, 20, 768), (20, 20, 768), (50, 20, 768), (100, 20, 768), (10, 40, 768), (10, 80, 768), (10, 20, 3072)]


def main(json_path: Path | None, quick: bool = False) -> None:
    """Print times, ratios, agreement and growth; ``quick`` is a small case that shows that it works."""
    sets = _sets(3, 5, 64) if quick else _sets(CLIENTS, PROMPTS, WIDTH)
    turns = 1 if quick else 5
    result: dict[str, Any] = {"shape": list(sets.shape), "threads": torch.get_num_threads(), "sweeps": SWEEPS}
    click.echo(
        f"C, n, D = {tuple(sets.shape)}, {SWEEPS} sweeps, {result['threads']} thread(s), medians of {turns} turn(s)"
    )
    for settings in (GenerativeSettings(sweeps=SWEEPS), GenerativeSettings(sweeps=SWEEPS, prior="reference")):
        result[settings.prior] = _compare(sets, settings, turns)
        _print_comparison(settings.prior, result[settings.prior])
    result |= {name: value for name, value in result["odds"].items() if name.endswith("_ratio")}
    result["growth"] = _growth(GROWTH[:1] if quick else GROWTH)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def _compare(sets: Tensor, settings: GenerativeSettings, turns: int) -> dict[str, Any]:
    """Seconds of each turn, ratios, and the share of equal assignments after ``SLOW_SWEEPS``."""
    slow = {"straightforward": lambda: straightforward(sets, settings, SLOW_SWEEPS)}
    seconds, results = in_turn({**slow, **_ours(sets, settings)}, turns)
    seconds["straightforward"] = [own * SWEEPS / SLOW_SWEEPS for own in seconds["straightforward"]]
    with torch.no_grad():
        _, ours, _ = fit(sets, replace(settings, sweeps=SLOW_SWEEPS), np.random.default_rng(0))
    return {
        **{f"{name}_seconds": times for name, times in seconds.items()},
        **{f"{name}_ratio": ratio(seconds["straightforward"], seconds[name]) for name in ("sequential", "joint")},
        "same_assignments": float((ours == results["straightforward"]).double().mean()),
    }


def _ours(sets: Tensor, settings: GenerativeSettings) -> dict[str, Callable[[], Any]]:
    """Our fit by both schedules, by their names."""
    return {name: partial(_fit, sets, replace(settings, schedule=name)) for name in ("sequential", "joint")}


def _fit(sets: Tensor, settings: GenerativeSettings) -> SetAggregation:
    return aggregate_sets(sets, settings, np.random.default_rng(0))


def _print_comparison(prior: str, found: dict[str, Any]) -> None:
    slow = median(found["straightforward_seconds"])
    click.echo(f"prior {prior}: straightforward {slow:.0f} s, extrapolated from {SLOW_SWEEPS} sweeps")
    for name in ("sequential", "joint"):
        times = found[f"{name}_seconds"]
        span = f"{median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"
        click.echo(f"  {name}: {span}, {found[f'{name}_ratio']:.0f} times as fast")
    click.echo(f"  assignments of straightforward and sequential agree in {found['same_assignments']:.1%}")


def straightforward(sets: Tensor, settings: GenerativeSettings, sweeps: int) -> Tensor:
    """Assignments [C, n] after ``sweeps`` of the sequential schedule, from the start that ``aggregate_sets`` draws."""
    clients, _, width = sets.shape
    hidden = settings.hidden
    drawn, assignment = start(sets, hidden, np.random.default_rng(0))
    sigma_net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())
    p_net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())
    for prefix, net in (("sigma.", sigma_net), ("p.", p_net)):
        net.load_state_dict({name.removeprefix(prefix): own for name, own in drawn.items() if name.startswith(prefix)})
    phi = nn.Parameter(drawn["phi"])
    z = one_hot(assignment, len(phi)).to(sets.dtype)  # [C, n, K]
    adam = torch.optim.Adam([phi, *sigma_net.parameters(), *p_net.parameters()], lr=settings.lr)
    for _ in range(sweeps):
        for client in range(clients):
            likelihood, normal = _likelihood_terms(sets[client], z[client], phi, sigma_net)
            prior, gain = _prior_terms(z[client], phi, p_net, settings.prior)
            adam.zero_grad()
            (-likelihood - prior).backward()
            adam.step()
            weights = (normal + gain).detach().numpy()
            z[client] = 0
            z[client][linear_sum_assignment(weights, maximize=True)] = 1
    return z.argmax(2)


def _likelihood_terms(prompts: Tensor, z: Tensor, phi: Tensor, sigma_net: nn.Module) -> tuple[Tensor, Tensor]:
    """The likelihood's part of a client's objective, and of its weights [n, K]."""
    total, columns = torch.zeros(()), []
    for k in range(len(phi)):
        mean = phi[k : k + 1]
        columns.append(Independent(Normal(mean, sigma_net(mean)), 1).log_prob(prompts))  # [n]
        total = total + (z[:, k] * columns[-1]).sum()
    return total, torch.stack(columns, dim=1)


def _prior_terms(z: Tensor, phi: Tensor, p_net: nn.Module, prior: str) -> tuple[Tensor, Tensor]:
    """The prior's part of a client's objective, and of its weights [1, K]."""
    total, columns = torch.zeros(()), []
    taken = z.sum(0)  # c_tk [K]
    for k in range(len(phi)):
        bernoulli = Independent(Bernoulli(p_net(phi[k : k + 1])), 1)
        if prior == "odds":
            present, absent = (bernoulli.log_prob(torch.full((1,), c)) for c in (1.0, 0.0))
            columns.append(present - absent)
            total = total + (taken[k] * present + (1 - taken[k]) * absent).sum()
        else:
            columns.append(bernoulli.log_prob(taken[k].expand(len(z))))  # one variable, scored for each prompt
            total = total + (z[:, k] * columns[-1]).sum()
    return total, torch.stack(columns, dim=1)


def _growth(shapes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    click.echo("growth of our own cost, one fit each:    C    n     D  sequential       joint")
    for clients, prompts, width in shapes:
        ways = _ours(_sets(clients, prompts, width), GenerativeSettings(sweeps=SWEEPS))
        seconds = {name: _timed(way) for name, way in ways.items()}
        rows.append({"clients": clients, "prompts": prompts, "width": width, **seconds})
        click.echo(
            f"{'':<38}{clients:>5}{prompts:>5}{width:>6}{seconds['sequential']:>10.2f} s{seconds['joint']:>10.2f} s"
        )
    return rows


def _sets(clients: int, prompts: int, width: int) -> Tensor:
    """Prompt sets [C, n, D]: the clients' versions of one set, each in an order of its own."""
    rng = np.random.default_rng(0)
    base = rng.uniform(-1, 1, (prompts, width)) * SCALE * 3**0.5
    sets = [base[rng.permutation(prompts)] + NOISE * rng.normal(size=base.shape) for _ in range(clients)]
    return torch.from_numpy(np.stack(sets)).float()


def _timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    program(main)
