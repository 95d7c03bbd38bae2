"""The closed-form set aggregation: what it recovers, what it averages, who leaves a slot, and what it costs nobody."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from by_hand import make, same, tiny_run

from fedprompt.algorithms.base import State
from fedprompt.algorithms.pfpt.map_aggregation import (
    MapOptions,
    Spreads,
    aggregate_around,
    filled,
    fit,
    posterior,
    prior_means,
    rematched,
)
from fedprompt.algorithms.pfpt.set_aggregation import GenerativeSettings, aggregate_sets
from fedprompt.client.tasks import Update
from fedprompt.errors import InputError
from fedprompt.models.params import weighted_mean
from studies.recovery.program import Planted, pair_agreement

PROMPTS, WIDTH, SCALE = 8, 96, 0.05
EXACT = 1e12  # evidence that tempers nothing


def normal(seed, *shape, scale=1.0):
    return scale * torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def sent_prompts():
    return normal(0, PROMPTS, WIDTH, scale=SCALE)


def moved(clients, by=0.005, seed=1):
    """Sets [C, n, D]: every client's prompts a little way off, each in a direction of its own."""
    return sent_prompts() + normal(seed, clients, PROMPTS, WIDTH, scale=by)


def aggregated(sets, samples=None, sent=None, max_size=None, **options):
    samples = samples or [1] * len(sets)
    return aggregate_around(sent_prompts() if sent is None else sent, sets, samples, MapOptions(**options), max_size)


def rms(values):
    return values.square().mean().sqrt().item()


@pytest.mark.parametrize("scale", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("noise", [0.01, 0.33, 1.0])
def test_planted_correspondences_are_recovered_at_every_scale_where_all_orders_are_mixed(scale, noise):
    problem = Planted(clients=5, prompts=10, width=128, scale=scale, noise=noise)
    sets, origin = problem.draw(np.random.default_rng(5))
    result = aggregated(sets, sent=sets.mean(0))  # which has no order at all
    assert pair_agreement(result.assignment.numpy(), origin) == (1.0, 1.0)
    assert result.metrics["pool_size"] == 10


@pytest.mark.parametrize("scale", [0.03, 0.1, 1.0])
def test_who_has_mixed_up_its_prompts_is_put_in_order(scale):
    sent = normal(0, PROMPTS, WIDTH, scale=scale)
    sets = sent + normal(1, 4, PROMPTS, WIDTH, scale=0.1 * scale)
    order = [3, 0, 5, 1, 7, 2, 6, 4]
    shuffled = sets.clone()
    shuffled[2] = sets[2, order]
    result, straight = aggregated(shuffled, sent=sent), aggregated(sets, sent=sent)
    assert result.assignment[2].tolist() == order
    assert result.assignment[[0, 1, 3]].tolist() == [list(range(PROMPTS))] * 3
    torch.testing.assert_close(result.pool, straight.pool, rtol=0, atol=1e-12)


def test_without_a_prior_on_the_slots_the_posterior_is_the_average_by_samples():
    sets, samples = moved(4, by=0.03), [5, 40, 10, 20]
    weights = np.array(samples) / np.mean(samples)
    slots = filled(sets.numpy(), weights, np.tile(np.arange(PROMPTS), (4, 1)))
    expected = prior_means(sent_prompts().numpy(), PROMPTS)
    means, variances = posterior(expected, slots, Spreads(0.01, math.inf, 1.0), np.arange(PROMPTS), PROMPTS)
    average = weighted_mean([{"pool": own} for own in sets], samples)["pool"]
    np.testing.assert_allclose(means, average.numpy(), rtol=0, atol=1e-15)
    np.testing.assert_allclose(variances, 0.01 / 4)


def test_clients_that_agree_are_averaged_slot_by_slot_by_samples():
    sets, samples = moved(4, by=1e-4) + normal(9, PROMPTS, WIDTH, scale=0.02), [5, 40, 10, 20]
    result = aggregated(sets, samples)
    average = weighted_mean([{"pool": own} for own in sets], samples)["pool"]
    assert rms(average - sent_prompts()) > 0.015
    torch.testing.assert_close(result.pool, average, rtol=0, atol=2e-5)


def test_clients_that_disagree_stay_at_what_was_sent_as_if_it_were_one_of_them():
    sets = moved(4, by=0.02)
    result = aggregated(sets)
    everybody = torch.cat([sent_prompts()[None], sets])
    torch.testing.assert_close(result.pool, everybody.mean(0), rtol=0, atol=1e-12)
    assert result.metrics["s"] == pytest.approx(0.02, rel=0.05)
    assert result.metrics["tau"] == result.metrics["s"]


def test_heavier_clients_count_more():
    sets = moved(2, by=0.02)
    for samples, nearer in (([1, 9], 1), ([9, 1], 0)):
        pool = aggregated(sets, samples).pool
        assert rms(pool - sets[nearer]) < 0.5 * rms(pool - sets[1 - nearer])
    expected = (sent_prompts() + 0.2 * sets[0] + 1.8 * sets[1]) / 3  # ω = 0.2 and 1.8
    torch.testing.assert_close(aggregated(sets, [10, 90]).pool, expected, rtol=0, atol=1e-12)


def test_identical_clients_leave_the_pool_as_it_is_where_the_original_drifts():
    sets = sent_prompts().float().expand(10, PROMPTS, WIDTH)
    result = aggregated(sets, sent=sent_prompts().float())
    torch.testing.assert_close(result.pool, sets[0], rtol=0, atol=1e-6)
    assert (result.metrics["opened"], result.metrics["closed"]) == (0, 0)
    original = aggregate_sets(sets, GenerativeSettings(), np.random.default_rng(0)).pool
    assert torch.cdist(original, sets[0]).min(1).values.max() > 1e-3 * WIDTH**0.5


def test_a_prompt_that_went_far_becomes_a_new_one_and_nobody_follows():
    sets = moved(5)
    sets[2, 3] = normal(7, WIDTH, scale=SCALE)
    result = aggregated(sets)
    expected = torch.arange(PROMPTS).repeat(5, 1)
    expected[2, 3] = PROMPTS
    assert torch.equal(result.assignment, expected)
    assert (result.metrics["opened"], result.metrics["closed"]) == (1, 0)
    assert rms(result.pool[PROMPTS] - sets[2, 3]) < 0.001
    others = torch.cat([sent_prompts()[None], sets[[0, 1, 3, 4]]]).mean(0)
    torch.testing.assert_close(result.pool[3], others[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("clients", [4, 10])
def test_two_groups_that_pull_one_prompt_apart_split_it(clients):
    sets = moved(clients)
    half = clients // 2
    away = normal(7, WIDTH, scale=0.03)
    sets[:half, 3] += away
    sets[half:, 3] -= away
    result = aggregated(sets)
    assert result.metrics["opened"] == 1
    first, second = result.assignment[:half, 3].unique(), result.assignment[half:, 3].unique()
    assert len(first) == len(second) == 1
    assert set(first.tolist() + second.tolist()) == {3, PROMPTS}
    assert rms(result.pool[first[0]] - sent_prompts()[3] - away) < 0.015
    assert rms(result.pool[second[0]] - sent_prompts()[3] + away) < 0.015


@pytest.mark.parametrize(("evidence", "opens"), [(10.0, False), (EXACT, True)])
def test_moves_of_different_lengths_split_nothing_unless_all_coordinates_count_as_independent(evidence, opens):
    """The numbers in the docstring: 20 prompts of width 384, 10 clients, moves as long as the prompts' own size."""
    rng = np.random.default_rng(0)
    sent = rng.uniform(-1, 1, (20, 384)) * SCALE * 3**0.5
    moves = SCALE * rng.uniform(0, 2, (10, 20, 1)) * rng.normal(size=(10, 20, 384))
    opened = aggregated(torch.from_numpy(sent + moves), sent=torch.from_numpy(sent), evidence=evidence)
    assert (opened.metrics["opened"] > 50) == opens
    assert opens or opened.metrics["opened"] == opened.metrics["closed"] == 0


@pytest.mark.parametrize("by", [0.002, 0.02, 0.05])
def test_independent_moves_of_one_length_split_nothing(by):
    assert aggregated(moved(5, by)).assignment.tolist() == [list(range(PROMPTS))] * 5


@pytest.mark.parametrize(
    ("noise", "evidence", "times"),
    [(0.005, EXACT, 2.3), (0.02, EXACT, 1.8), (0.05, EXACT, 1.6), (0.005, 10, 2.5), (0.02, 10, 2.0), (0.05, 10, 2.0)],
)
def test_a_prompt_leaves_its_slot_at_the_distance_that_the_docstring_tells(noise, evidence, times):
    clients, width, prior, options = 5, 384, 0.05**2, MapOptions(evidence=evidence)
    phi = np.zeros((2, width))  # the prompt, and another one in a direction of its own
    phi[0, :128] = phi[1, 128:256] = math.sqrt(3 * prior)
    typical = math.sqrt(noise**2 * (1 + 1 / clients))  # √A
    bound = leaves_at(typical**2, noise**2 + prior, clients, options, width, np.square(phi[0] - phi.mean(0)).mean())
    for factor, place in ((0.97, 0), (1.03, 2)):
        places = np.tile(np.arange(2), (clients, 1))
        sets = np.tile(phi, (clients, 1, 1))
        sets[0, 0, 256:] = factor * bound * typical * math.sqrt(3)
        slots = filled(sets, np.ones(clients), places)
        slots.put(sets[0], 1.0, places[0], sign=-1)
        assert rematched(phi, sets[0], slots, Spreads(noise**2, noise**2, prior), clients, options)[0] == place
    told = leaves_at(typical**2, noise**2 + prior, clients, options, width, prior)
    assert told == pytest.approx(times, abs=0.05)


def leaves_at(a, b, clients, options, width, at_rest):
    """√(q / A) at which q/A − r/B = log(B/A) + 2/(ζD) (log odds + log C/γ), with r = ``at_rest`` + q."""
    zeta = 1 / (1 + width / options.evidence)
    odds = math.log((clients - 1 + options.concentration) / options.concentration) + math.log(clients / options.gamma)
    return math.sqrt((math.log(b / a) + 2 / (zeta * width) * odds + at_rest / b) / (1 - a / b))


def test_a_client_is_matched_as_the_written_formula_and_brute_force_say():
    rng = np.random.default_rng(3)
    clients, prompts, width, options = 3, 3, 4, MapOptions(gamma=0.7, concentration=0.5, evidence=2.0)
    for _ in range(20):
        phi = rng.normal(size=(prompts, width))
        sets = phi + 0.6 * rng.normal(size=(clients, prompts, width))
        weights = rng.uniform(0.5, 2, clients)
        places = np.array([rng.choice(6, prompts, replace=False) for _ in range(clients)])
        spreads = Spreads(0.3, 0.5, 1.1)
        slots = filled(sets, weights, places)
        slots.put(sets[0], weights[0], places[0], sign=-1)
        found = rematched(phi, sets[0], slots, spreads, clients, options)
        gains = np.array(
            [[gain(j, k, phi, sets, weights, places, spreads, options) for k in range(9)] for j in (0, 1, 2)]
        )
        best = max(itertools.permutations(range(9), prompts), key=lambda ks: sum(gains[j, k] for j, k in enumerate(ks)))
        assert gains[np.arange(3), found].sum() == pytest.approx(gains[np.arange(3), best].sum(), rel=1e-12)
        assert len(set(found)) == prompts


def gain(j, k, phi, sets, weights, places, spreads, options):
    """W_tjk of client 0, word for word; candidates 3 and above are new ones or opened by the others."""
    clients, prompts, width = sets.shape
    others = [(weights[t], sets[t, i]) for t in range(1, clients) for i in range(prompts) if places[t, i] == k]
    before, mean = (spreads.drift, phi[k]) if k < prompts else (spreads.prior, phi.mean(0))
    v = 1 / (1 / before + sum(w for w, _ in others) / spreads.noise)
    m = v * (mean / before + sum((w * p for w, p in others), np.zeros(width)) / spreads.noise)
    density = torch.distributions.Normal(torch.from_numpy(m), math.sqrt(spreads.noise + v))
    odds = math.log((len(others) + options.concentration) / (clients - 1 - len(others) + options.concentration))
    if k >= prompts and not others:
        odds = math.log(options.gamma / clients)
    return density.log_prob(torch.from_numpy(sets[0, j])).sum().item() / (1 + width / options.evidence) + odds


def test_the_scale_of_everything_plays_no_role():
    sets = moved(5, by=0.02)
    sets[2, 3] = normal(7, WIDTH, scale=SCALE)
    small, large = aggregated(sets), aggregated(30 * sets, sent=30 * sent_prompts())
    assert torch.equal(small.assignment, large.assignment)
    torch.testing.assert_close(30 * small.pool, large.pool, rtol=1e-10, atol=1e-12)


def test_the_order_of_clients_changes_nothing_where_matches_are_clear():
    sets, samples, order = moved(5), [3, 1, 4, 1, 5], [4, 2, 0, 3, 1]
    sets[2, 3] = normal(7, WIDTH, scale=SCALE)
    first, second = aggregated(sets, samples), aggregated(sets[order], [samples[t] for t in order])
    assert torch.equal(first.assignment[order], second.assignment)
    torch.testing.assert_close(first.pool, second.pool, rtol=0, atol=1e-12)


def test_same_input_gives_the_same_bytes_and_input_stays_as_it_is():
    sets = moved(5, by=0.05).float()
    before = sets.clone()
    first, second = (aggregated(sets, sent=sent_prompts().float()) for _ in range(2))
    assert torch.equal(sets, before)
    assert first.pool.dtype == torch.float32
    assert first.pool.numpy().tobytes() == second.pool.numpy().tobytes()
    assert first.metrics == second.metrics


def test_a_cohort_of_one_keeps_its_prompts_halfway_to_where_they_went():
    sets = moved(1, by=0.02)
    result = aggregated(sets)
    assert result.assignment.tolist() == [list(range(PROMPTS))]
    torch.testing.assert_close(result.pool, (sets[0] + sent_prompts()) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 1, 5), (2, 4, 1)])
def test_the_smallest_sets_have_finite_answers(shape):
    for sets in (normal(2, *shape), torch.zeros(shape)):
        result = aggregated(sets, sent=sets[0])
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert torch.isfinite(result.pool).all()


def test_max_size_keeps_the_most_used():
    sets = moved(5)
    sets[2, 3] = normal(7, WIDTH, scale=SCALE)
    free, capped = aggregated(sets), aggregated(sets, max_size=PROMPTS)
    assert (len(free.pool), len(capped.pool)) == (PROMPTS + 1, PROMPTS)
    assert torch.equal(capped.pool, free.pool[:PROMPTS])
    assert capped.assignment[2, 3] == -1
    assert capped.metrics["opened"] == 0
    few = aggregated(sets, max_size=PROMPTS - 1)
    assert torch.equal(few.pool, free.pool[[0, 1, 2, 4, 5, 6, 7]])  # one client less has prompt 3
    assert few.metrics["closed"] == 1


def test_it_ends_when_nothing_changes_or_after_so_many_sweeps():
    phi, sets = sent_prompts().numpy(), moved(3).numpy()
    assert fit(phi, sets, np.ones(3), MapOptions())[2] == {"changed": 0.0, "sweeps": 1.0}
    sets[1] = sets[1, ::-1]
    assert fit(phi, sets, np.ones(3), MapOptions())[2] == {"changed": 0.0, "sweeps": 2.0}
    assert fit(phi, sets, np.ones(3), MapOptions(sweeps=1))[2] == {"changed": pytest.approx(1 / 3), "sweeps": 1.0}


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match=r"^max_size: 0"):
        aggregated(moved(2), max_size=0)
    with pytest.raises(ValueError, match="finite and of shape"):
        aggregated(moved(2) * math.nan)


def updated(client, samples, pool, used, bias):
    chosen = torch.tensor([i in used for i in range(len(pool))])
    return Update(client, samples, 1, {"pool": pool, "head.1.bias": torch.full((2,), bias)}, chosen, 0.0)


def test_prompts_that_nobody_used_leave_and_the_rest_is_averaged_by_samples():
    sent, sets = sent_prompts(), moved(2)
    state = State({"pool": sent, "head.1.bias": torch.zeros(2)})
    updates = [updated(0, 10, sets[0], (0, 2), 1.0), updated(4, 30, sets[1], (2, 5), 5.0)]
    results = [make("pfpt-map").aggregate(state, updates, np.random.default_rng(seed)) for seed in (0, 1)]
    state, metrics = results[0]
    assert metrics["used"] == metrics["pool_size"] == 3
    assert metrics["moved_relative"] == pytest.approx(0.1, rel=0.1)
    expected = (sent + 0.5 * sets[0] + 1.5 * sets[1])[[0, 2, 5]] / 3
    torch.testing.assert_close(state.params["pool"], expected, rtol=0, atol=1e-12)
    assert state.params["head.1.bias"].tolist() == [4.0, 4.0]
    assert same(state.params, results[1][0].params)  # nothing is drawn


@pytest.mark.runs
def test_it_runs_and_tells_what_happens_to_the_pool(tmp_path):
    records, state = tiny_run(tmp_path, "algorithm.name=pfpt-map", "algorithm.mu=0.1")
    told = records[1]["aggregate"]
    assert told.keys() >= {
        *("pool_size", "clients_per_candidate", "drift", "drift_relative", "changed", "opened", "closed", "s", "tau"),
        *("moved_relative", "used", "sweeps"),
    }
    assert len(state.params["pool"]) == records[2]["aggregate"]["pool_size"]
