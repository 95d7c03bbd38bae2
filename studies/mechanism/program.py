"""What happens inside PFPT's server step, measured on the prompt sets of a real federation, round by round.

In every round of a run of PFPT the clients' sets are looked at before they are aggregated:

    moved       how far local prompts are from what was sent
    between     how far the clients' versions of one prompt are from their mean: the spread that σ should learn
    apart       from a prompt to the nearest other one of the pool

and then what a fit of so many sweeps makes of them: the prompts in the pool, the share of assignments that its last
sweep changed, σ of the candidates in use, how far they drift from the mean of what is matched to them, and how much the
prior says, the standard deviation over candidates of log p − log(1 − p) in nats, against the margin of the weights.
Lengths are root mean squares of a coordinate, relative to that of the prompts that were sent.

Then the same sets are scaled, prompts and differences alike, and what comes of them is counted; and so are ten
identical copies of what was sent. A CSV of all rows and the figure are written below runs/mechanism, or next to --json
FILE, which then says what was run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedprompt.algorithms.pfpt import generative_model as model
from fedprompt.algorithms.pfpt.evidence import matching_weights
from fedprompt.algorithms.pfpt.set_aggregation import GenerativeSettings, fit, keep_used, mean_of_matched
from fedprompt.tracking.plots import BLUE, GREY, ORANGE, STYLE, save
from studies.ablations.program import RATES
from studies.comparison.contestants import Overrides
from studies.comparison.program import SHARED, TINY

SETTING: Overrides = ("partition.alpha=0.1", "seed=0")
ROUNDS = (1, 2, 5, 10, 20)  # at which the sets are taken apart
SWEEPS = (1, 2, 5, 10, 20, 50, 200)
SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SWEEPS_OF_RUN = GenerativeSettings().sweeps
COPIES = 10


@dataclass(frozen=True)
class Sets:
    """What a server step starts from."""

    round: int
    sent: Tensor  # [n, D], the prompts of the pool that the cohort used
    sets: Tensor  # [C, n, D], the clients' versions of them


def main(json_path: Path | None, quick: bool = False) -> None:
    """Run the federation, take its sets apart, print and draw; ``quick`` does so on a tiny backbone."""
    base = Path("runs/mechanism/mechanism") if json_path is None else json_path.with_suffix("")
    rows, run = [], (*SHARED, "algorithm.name=pfpt", *RATES, *SETTING, *(TINY if quick else ()))
    for sets in prompt_sets(run):
        if sets.round in ROUNDS[: 2 if quick else None]:
            rows += [{"what": "sweeps", **row} for row in taken_apart(sets, SWEEPS[: 2 if quick else None])]
            last = sets
    scales = SCALES[: 2 if quick else None]
    for scale in scales:
        scaled = replace(last, sent=scale * last.sent, sets=scale * last.sets)
        rows += [{"what": "scale", "scale": scale, **row} for row in taken_apart(scaled, (SWEEPS_OF_RUN,))]
        same = replace(scaled, sets=scaled.sent.expand(COPIES, *scaled.sent.shape))
        rows += [{"what": "copies", "scale": scale, **row} for row in taken_apart(same, (SWEEPS_OF_RUN,))]
    table = pd.DataFrame(rows)
    base.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(base.with_suffix(".csv"), index=False, float_format="%.6g")
    save(figure(table), base.with_suffix(".png"))
    for what, of_what in table.groupby("what", sort=False):
        click.echo(
            f"{what}:\n{of_what.drop(columns='what').dropna(axis='columns', how='all').round(4).to_string(index=False)}"
        )
    click.echo(f"written: {base.with_suffix('.csv')}, {base.with_suffix('.png')}")
    if json_path is not None:
        json_path.write_text(json.dumps({"run": list(run)}, indent=1) + "\n")


def prompt_sets(overrides: Overrides) -> Iterator[Sets]:
    """Run a federation of PFPT without scoring it; yields what every server step starts from."""
    from fedprompt.config.parsing import load
    from fedprompt.runtime.build import build_algorithm, build_data
    from fedprompt.runtime.pool import InProcessPool
    from fedprompt.seeding import Stream, generator

    config = load(None, list(overrides))
    algorithm, pool = build_algorithm(config), InProcessPool(config, build_data(config))
    state = algorithm.init(pool.facts.params, generator(config.seed, Stream.INIT, 0, 1))
    for round in range(1, config.federation.rounds + 1):
        cohort = algorithm.cohort(state, round, generator(config.seed, Stream.COHORT, round))
        groups = [[algorithm.task(state, client, config.local.epochs)] for client in cohort]
        updates = [update for done in pool.train(round, groups) for update in done]
        updates.sort(key=lambda update: update.client)
        used = algorithm.used(state, updates)
        yield Sets(round, state.params["pool"][used], torch.stack([update.params["pool"][used] for update in updates]))
        state, _ = algorithm.aggregate(state, updates, generator(config.seed, Stream.AGGREGATE, round))
    pool.close()


def taken_apart(given: Sets, sweeps: tuple[int, ...]) -> list[dict[str, float]]:
    """A row per number of sweeps: the sets as they are, and what a fit of so many makes of them."""
    length = _rms(given.sent)
    apart = torch.cdist(given.sent.double(), given.sent.double()) / given.sent.shape[1] ** 0.5
    known = {
        "round": given.round,
        "length": length,
        "moved": _rms(given.sets - given.sent) / length,
        "between": _rms(given.sets - given.sets.mean(0)) / length,
        "apart": apart.fill_diagonal_(torch.inf).amin(1).mean().item() / length,
    }
    return [{**known, "sweeps": count, **_fitted(given.sets, count, length)} for count in sweeps]


def _fitted(sets: Tensor, sweeps: int, length: float) -> dict[str, float]:
    """What a fit from the start that a run's first round draws makes of sets [C, n, D]."""
    settings = GenerativeSettings(sweeps=sweeps)
    with torch.no_grad():
        parameters, assignment, changed = fit(sets, settings, np.random.default_rng(0))
        candidates, kept = keep_used(parameters["phi"], sets, assignment, None)
        nets = model.forward(parameters, settings.prior)
        means, _ = mean_of_matched(sets, kept.assignment, len(candidates))
        weights = matching_weights(sets, parameters["phi"], nets, assignment, settings.prior)
    best = weights.topk(2, dim=2).values
    return {
        "prompts": float(len(candidates)),
        "changed": changed,
        "sigma": _rms(nets.sigma[candidates]) / length,
        "drift": _rms(kept.pool - means) / length,
        "prior_nats": nets.logit.double().std().item(),
        "margin_nats": (best[..., 0] - best[..., 1]).median().item(),
    }


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@mpl.rc_context(STYLE)
def figure(table: pd.DataFrame) -> Figure:
    """Draw σ and the true spread over sweeps, drift and move over rounds, the pool's size over the prompts' scale."""
    drawn = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    sweeps = table[table.what == "sweeps"]
    last = sweeps[sweeps["round"] == sweeps["round"].max()]
    left.loglog(last.sweeps, last.sigma, "o-", color=BLUE, label="σ of candidates in use")
    left.loglog(last.sweeps, last.between, "--", color=GREY, label="clients' true spread")
    left.set_xlabel("sweeps")
    left.set_ylabel("relative to a prompt's length")
    whole = sweeps[sweeps.sweeps == min(SWEEPS_OF_RUN, sweeps.sweeps.max())]
    for name, colour in (("moved", GREY), ("between", ORANGE), ("drift", BLUE)):
        middle.plot(whole["round"], 100 * whole[name], "o-", color=colour, label=name)
    middle.set_xlabel("round")
    middle.set_ylabel("% of a prompt's length")
    for what, colour in (("scale", BLUE), ("copies", GREY)):
        rows = table[table.what == what]
        right.plot(rows["length"], rows.prompts, "o-", color=colour, label={"scale": "clients' sets"}.get(what, what))
    right.set_xscale("log")
    right.set_xlabel("length of a prompt's coordinate")
    right.set_ylabel("prompts in the pool")
    for axes in (left, middle, right):
        axes.grid(True)
        axes.legend(frameon=False)
    return drawn
