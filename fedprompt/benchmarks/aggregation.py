"""PFPT's server step against the straightforward form of the published one, on the same input, in turn.

The straightforward form is written for this comparison: PyTorch modules and autograd, a Python loop over candidates,
one Adam step and one matching per client, everything computed anew each time. It takes minutes, so it is timed over two
sweeps, before and after our own fits, and the mean is extrapolated. Both start from the same parameters and
assignments; the assignments after those sweeps must agree. ``joint`` is compared with the same slow form: it fits the
same model in fewer, larger steps.

Then, how the cost of our own form grows with the number of clients C, prompts n and width D.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from fedprompt.algorithms.set_aggregation import GenerativeSettings, aggregate_sets, fit, start

CLIENTS, PROMPTS, WIDTH, SWEEPS = 10, 20, 768, 50
SLOW_SWEEPS = 2
SCALE, NOISE = 0.05, 0.005  # of prompts, and of the clients' moves: what training makes of them
GROWTH = [(10, 20, 768), (20, 20, 768), (50, 20, 768), (100, 20, 768), (10, 40, 768), (10, 80, 768), (10, 20, 3072)]


def main(json_path: Path | None, quick: bool = False) -> None:
    """Print times, ratios, agreement and growth; ``quick`` is a small case that shows that it works."""
    sets = _sets(3, 5, 64) if quick else _sets(CLIENTS, PROMPTS, WIDTH)
    repetitions = 1 if quick else 5
    settings = GenerativeSettings(sweeps=SWEEPS)
    before, slow = _timed(lambda: straightforward(sets, settings, SLOW_SWEEPS))
    seconds: dict[str, list[float]] = {"sequential": [], "joint": []}
    for _ in range(repetitions):
        for schedule, times in seconds.items():
            chosen = replace(settings, schedule=schedule)
            times.append(_timed(lambda chosen=chosen: aggregate_sets(sets, chosen, np.random.default_rng(0)))[0])
    after, _ = _timed(lambda: straightforward(sets, settings, SLOW_SWEEPS))
    slow_seconds = (before + after) / 2
    with torch.no_grad():
        _, ours, _ = fit(sets, replace(settings, sweeps=SLOW_SWEEPS), np.random.default_rng(0))
    same = float((ours == slow).double().mean())
    extrapolated = slow_seconds * SWEEPS / SLOW_SWEEPS
    result: dict[str, Any] = {
        "shape": list(sets.shape),
        "threads": torch.get_num_threads(),
        "straightforward_seconds": {"timed": [before, after], "sweeps": SLOW_SWEEPS, "extrapolated": extrapolated},
        "same_assignments": same,
        **{f"{name}_seconds": times for name, times in seconds.items()},
        **{f"{name}_ratio": extrapolated / median(times) for name, times in seconds.items()},
    }
    click.echo(f"C, n, D = {tuple(sets.shape)}, {SWEEPS} sweeps, {torch.get_num_threads()} thread(s)")
    click.echo(f"straightforward: {slow_seconds:.1f} s for {SLOW_SWEEPS} sweeps, extrapolated to {extrapolated:.0f} s")
    for name, times in seconds.items():
        ratio = result[f"{name}_ratio"]
        click.echo(f"{name}: {median(times):.3f} s ({min(times):.3f} to {max(times):.3f}), {ratio:.0f} times as fast")
    click.echo(f"assignments of both after {SLOW_SWEEPS} sweeps agree in {same:.1%}")
    result["growth"] = _growth(GROWTH[:1] if quick else GROWTH)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def straightforward(sets: Tensor, settings: GenerativeSettings, sweeps: int) -> Tensor:
    """Assignments [C, n] after ``sweeps`` of the sequential schedule, from the start that ``aggregate_sets`` draws."""
    clients, prompts, width = sets.shape
    flat, assignment = start(sets, settings.hidden, np.random.default_rng(0))
    sigma_net = nn.Sequential(nn.Linear(width, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, width))
    p_net = nn.Sequential(nn.Linear(width, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1))
    phi = nn.Parameter(flat[: clients * prompts * width].view(-1, width).clone())
    nets = [*sigma_net.parameters(), *p_net.parameters()]
    nn.utils.vector_to_parameters(flat[phi.numel() :], nets)
    adam = torch.optim.Adam([phi, *nets], lr=settings.lr)
    for _ in range(sweeps):
        for client in range(clients):
            columns, absent = [], []
            for candidate in phi:
                sigma, p = torch.sigmoid(sigma_net(candidate)), torch.sigmoid(p_net(candidate))
                likelihood = Independent(Normal(candidate, sigma), 1).log_prob(sets[client])  # [n]
                columns.append(likelihood + torch.log(p) - torch.log1p(-p))
                absent.append(torch.log1p(-p))
            weights = torch.stack(columns, dim=1)  # [n, K]
            matched = weights.gather(1, assignment[client, :, None]).sum()
            adam.zero_grad()
            (-matched - torch.cat(absent).sum()).backward()
            adam.step()
            assignment[client] = torch.from_numpy(linear_sum_assignment(weights.detach().numpy(), maximize=True)[1])
    return assignment


def _growth(shapes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    click.echo("growth of our own cost, one fit each:    C    n     D  sequential       joint")
    for clients, prompts, width in shapes:
        sets, settings = _sets(clients, prompts, width), GenerativeSettings(sweeps=SWEEPS)
        seconds = {}
        for schedule in ("sequential", "joint"):
            chosen = replace(settings, schedule=schedule)
            seconds[schedule] = _timed(lambda c=chosen, s=sets: aggregate_sets(s, c, np.random.default_rng(0)))[0]
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


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result
