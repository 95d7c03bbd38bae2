"""The generative set aggregation against plain transcriptions of its formulas, brute force, and planted answers."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedprompt.algorithms.pfpt import evidence
from fedprompt.algorithms.pfpt import generative_model as model
from fedprompt.algorithms.pfpt.evidence import matching_weights
from fedprompt.algorithms.pfpt.set_aggregation import GenerativeSettings, aggregate_sets, match, start
from fedprompt.errors import InputError
from studies.recovery import program as recovery

PRIORS = ("odds", "reference", "none")
CLIENTS, PROMPTS, WIDTH, HIDDEN = 3, 2, 5, 4


class Naive(nn.Module):
    """The formulas, word for word: loops, ``nn`` modules, autograd, float64, indicators z [C, n, K]."""

    def __init__(self, drawn: dict[str, torch.Tensor]) -> None:
        super().__init__()
        hidden, width = drawn["sigma.0.weight"].shape
        self.phi = nn.Parameter(drawn["phi"].clone())
        self.sigma = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid()).double()
        self.p = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()).double()
        for prefix, net in (("sigma.", self.sigma), ("p.", self.p)):
            net.load_state_dict({key.removeprefix(prefix): v for key, v in drawn.items() if key.startswith(prefix)})

    def log_normal(self, prompt: torch.Tensor, k: int) -> torch.Tensor:
        return torch.distributions.Normal(self.phi[k], self.sigma(self.phi[k])).log_prob(prompt).sum()

    def client_objective(self, prompts: torch.Tensor, z: torch.Tensor, prior: str) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for j, k in itertools.product(range(len(prompts)), range(len(self.phi))):
            total = total + z[j, k] * self.log_normal(prompts[j], k)
        if prior == "none":
            return total
        for k in range(len(self.phi)):
            c, p = z[:, k].sum(), self.p(self.phi[k])[0]
            if prior == "odds":
                total = total + c * torch.log(p) + (1 - c) * torch.log(1 - p)
            else:
                total = total + len(prompts) * c * torch.log(p)
        return total

    def weights(self, prompts: torch.Tensor, z: torch.Tensor, prior: str) -> torch.Tensor:
        rows = torch.empty(len(prompts), len(self.phi), dtype=torch.float64)
        for j, k in itertools.product(range(len(prompts)), range(len(self.phi))):
            p = self.p(self.phi[k])[0]
            if prior == "odds":
                gain = torch.log(p) - torch.log(1 - p)
            elif prior == "none":
                gain = 0
            else:
                gain = len(prompts) * (torch.log(p) if z[:, k].sum() == 1 else torch.log(1 - p))
            rows[j, k] = self.log_normal(prompts[j], k) + gain
        return rows.detach()


def indicators(assignment: torch.Tensor, candidates: int) -> torch.Tensor:
    return nn.functional.one_hot(assignment, candidates).double()


def best_by_brute_force(weights: np.ndarray) -> tuple[int, ...]:
    n, candidates = weights.shape
    return max(
        itertools.permutations(range(candidates), n), key=lambda ks: sum(weights[j, k] for j, k in enumerate(ks))
    )


@pytest.fixture
def small() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Sets [C, n, D], parameters whose φ is no longer where it starts, and an assignment with a shared candidate."""
    rng = np.random.default_rng(0)
    sets = torch.from_numpy(rng.normal(size=(CLIENTS, PROMPTS, WIDTH)))
    parameters, _ = start(sets, HIDDEN, rng)
    for own in parameters.values():
        own += 0.3 * torch.from_numpy(rng.normal(size=own.shape))
    return sets, parameters, torch.tensor([[0, 3], [3, 1], [5, 0]])


def naive_total(naive: Naive, sets: torch.Tensor, assignment: torch.Tensor, prior: str) -> torch.Tensor:
    z = indicators(assignment, len(naive.phi))
    return sum(naive.client_objective(sets[t], z[t], prior) for t in range(len(sets)))


@pytest.mark.parametrize("prior", PRIORS)
def test_objective_is_the_written_formula(small, prior):
    sets, parameters, assignment = small
    naive = Naive(parameters)
    got = model.objective(parameters, sets, assignment, prior)
    assert got.item() == pytest.approx(naive_total(naive, sets, assignment, prior).item(), rel=1e-12)


@pytest.mark.parametrize("prior", PRIORS)
def test_gradient_is_that_of_the_written_formula(small, prior):
    sets, parameters, assignment = small
    naive = Naive(parameters)
    naive_total(naive, sets, assignment, prior).backward()
    expected = {name: own.grad for name, own in naive.named_parameters() if own.grad is not None}
    assert (expected["phi"].abs().min() == 0) == (prior != "odds")  # unmatched candidates feel the odds alone
    got = model.gradient(parameters, model.forward(parameters, prior), sets, assignment, prior)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prior", PRIORS)
def test_weights_are_the_written_formula(small, prior):
    sets, parameters, assignment = small
    naive = Naive(parameters)
    z = indicators(assignment, CLIENTS * PROMPTS)
    expected = torch.stack([naive.weights(sets[t], z[t], prior) for t in range(CLIENTS)])
    got = matching_weights(sets, parameters["phi"], model.forward(parameters), assignment, prior)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("states", [1, 2, 32])
@pytest.mark.parametrize("prior", PRIORS)
def test_weights_of_many_states_are_those_of_each(small, prior, states, monkeypatch):
    """Every client has a state of its own; after the last client comes the first again, however many are kept."""
    monkeypatch.setattr(evidence, "_STATES", states)
    sets, parameters, assignment = small
    sets *= 100  # so that some distances are taken from differences
    kept, waiting, got, expected = evidence.Evidence(sets, 1, CLIENTS * PROMPTS), [], [], []
    for turn in range(2 * CLIENTS):
        client = [turn % CLIENTS]
        parameters["phi"] = sets.flatten(0, 1) + 0.01 * turn
        nets = model.forward(parameters)
        kept.add(parameters["phi"], nets)
        expected.append(matching_weights(sets[client], parameters["phi"], nets, assignment[client], prior))
        waiting += client
        if kept.full:
            assert list(range(CLIENTS))[kept.clients] == waiting
            got.append(evidence.weigh(*kept.take(), assignment[waiting], prior))
            waiting = []
    assert len(got) == {1: 6, 2: 4, 32: 2}[states]
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), rtol=0, atol=0)


def test_reference_prior_sums_one_bernoulli_variable_over_all_prompts_of_a_client(small):
    """As the authors' code does: Independent(Bernoulli(p), 1) of shape [1] scores c_tk repeated for n prompts."""
    sets, parameters, assignment = small
    p = Naive(parameters).p
    c = indicators(assignment[0], CLIENTS * PROMPTS).sum(0)
    variables = [
        torch.distributions.Independent(torch.distributions.Bernoulli(p(phi.unsqueeze(0))), 1)
        for phi in parameters["phi"]
    ]
    scores = [variable.log_prob(taken.expand(PROMPTS)) for variable, taken in zip(variables, c, strict=True)]
    nets = model.forward(parameters)
    without, got = (
        matching_weights(sets[:1], parameters["phi"], nets, assignment[:1], prior) for prior in ("none", "reference")
    )
    torch.testing.assert_close(got - without, torch.cat(scores).expand(1, PROMPTS, -1))


def test_odds_weight_is_what_the_objective_gains_by_using_a_candidate(small):
    sets, parameters, _ = small
    before = torch.tensor([[0, 3]])
    after = torch.tensor([[4, 3]])
    weights = matching_weights(sets[:1], parameters["phi"], model.forward(parameters), before, "odds")
    gain = model.objective(parameters, sets[:1], after, "odds") - model.objective(parameters, sets[:1], before, "odds")
    torch.testing.assert_close(weights[0, 0, 4] - weights[0, 0, 0], gain)


def log_likelihood(prompts: torch.Tensor, phi: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """log N(prompt; φ_k, σ_k²) for every prompt and candidate: [n, D], [K, D], [K, D] -> [n, K]."""
    nets = model.Forward(hidden_sigma=sigma, sigma=sigma, hidden_p=None, logit=torch.zeros(len(phi)))
    unmatched = torch.zeros(1, len(prompts), dtype=torch.int64)
    return matching_weights(prompts.unsqueeze(0), phi, nets, unmatched, "none")[0]


def test_likelihoods_of_close_prompts_survive_float32_input():
    """Prompts of scale 1 whose copies differ by 1 %: squares sum to millions, differences to fractions."""
    rng = np.random.default_rng(0)
    phi = torch.from_numpy(rng.normal(size=(100, 768))).float()  # more than one block
    prompts = phi[:7] + torch.from_numpy(0.01 * rng.normal(size=(7, 768))).float()
    log_sigma = torch.from_numpy(rng.uniform(-4, -0.1, size=(100, 768))).float()
    normal = torch.distributions.Normal(phi.double(), log_sigma.double().exp())
    expected = torch.stack([normal.log_prob(prompt.double()).sum(1) for prompt in prompts])
    got = log_likelihood(prompts, phi, log_sigma.exp())
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(got.diagonal(), expected.diagonal(), rtol=0, atol=1e-3)


def test_likelihoods_survive_float32_when_every_prompt_is_close_to_every_candidate():
    rng = np.random.default_rng(0)
    phi = (1 + torch.from_numpy(0.01 * rng.normal(size=(100, 64)))).float()
    prompts = (1 + torch.from_numpy(0.01 * rng.normal(size=(7, 64)))).float()  # 700 pairs: more than are held at a time
    sigma = torch.full((100, 64), 0.01)
    expected = torch.stack([torch.distributions.Normal(phi, sigma).log_prob(prompt).sum(1) for prompt in prompts])
    got = log_likelihood(prompts, phi, sigma)
    torch.testing.assert_close(got, expected.double(), rtol=0, atol=1e-3)


def test_tiny_sigmas_give_finite_and_hopeless_likelihoods():
    """The σ-net extrapolates to these at candidates that nobody uses; 1/σ² = e^120 would be beyond float32."""
    phi, prompts = torch.tensor([[0.5, 1.0], [0.5, 2.0]]), torch.tensor([[0.5, 2.0]])
    far, exact = log_likelihood(prompts, phi, torch.full((2, 2), math.exp(-30)))[0].tolist()
    assert far == pytest.approx(-0.5 * math.exp(60), rel=1e-5)
    assert exact == pytest.approx(60 - math.log(2 * math.pi))
    parameters, _ = start(phi.unsqueeze(0), HIDDEN, np.random.default_rng(0))
    for bias in (-60.0, -1000.0):
        parameters["sigma.2.bias"].fill_(bias)
        far, exact = log_likelihood(prompts, phi, model.forward(parameters).sigma)[0].tolist()
        assert -math.inf < far < -1e29
        assert math.isfinite(exact)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 50])
def test_log_determinants_are_exact_for_every_width(width):
    sigma = torch.from_numpy(np.random.default_rng(0).uniform(1e-15, 1, size=(3, width))).float()
    got = log_likelihood(torch.zeros(1, width), torch.zeros(3, width), sigma)[0]
    normal = torch.distributions.Normal(torch.zeros(3, width, dtype=torch.float64), sigma.double())
    torch.testing.assert_close(got, normal.log_prob(torch.zeros(width)).sum(1), rtol=1e-12, atol=1e-12)


def test_without_a_prior_the_p_net_has_no_say_and_is_not_run(small, monkeypatch):
    sets, parameters, assignment = small
    ran = []
    monkeypatch.setattr(model, "plain_linear", lambda x, w, b=0: ran.append(w.shape) or x @ w.T + b)
    results = []
    for shift in (0.0, 3.0):
        parameters["p.2.weight"] += shift
        nets = model.forward(parameters, "none")
        weights = matching_weights(sets, parameters["phi"], nets, assignment, "none")
        results.append((weights, model.objective(parameters, sets, assignment, "none")))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert ran.count((HIDDEN, WIDTH)) == 4  # the σ-net's first layer, for weights and objective, twice; p's never


def test_nothing_overflows_when_the_prior_saturates(small):
    sets, parameters, assignment = small
    parameters["p.2.bias"].fill_(800.0)  # p = 1 and log(1 - p) = -800 in exact arithmetic
    assert torch.isfinite(model.objective(parameters, sets, assignment, "odds"))
    for prior in PRIORS:
        nets = model.forward(parameters)
        assert torch.isfinite(matching_weights(sets, parameters["phi"], nets, assignment, prior)).all()


def test_matching_equals_brute_force():
    rng = np.random.default_rng(0)
    for n, candidates in ((1, 1), (1, 4), (2, 2), (3, 3), (3, 6), (4, 6)):
        for _ in range(10):
            weights = rng.normal(size=(n, candidates))
            assert tuple(match(weights)) == best_by_brute_force(weights)


def naive_fit(sets, settings, seed):
    """The schedules as the docstring tells them, step by step, on :class:`Naive`."""
    clients, prompts, _ = sets.shape
    parameters, assignment = start(sets, settings.hidden, np.random.default_rng(seed))
    naive = Naive(parameters)
    adam = torch.optim.Adam(naive.parameters(), lr=settings.lr)
    for _ in range(settings.sweeps):
        groups = [[t] for t in range(clients)] if settings.schedule == "sequential" else [list(range(clients))]
        for group in groups:
            z = indicators(assignment, clients * prompts)
            weights = {t: naive.weights(sets[t], z[t], settings.prior).numpy() for t in group}
            loss = -sum(naive.client_objective(sets[t], z[t], settings.prior) for t in group)
            adam.zero_grad(set_to_none=False)
            loss.backward()
            adam.step()
            for t in group:
                assignment[t] = torch.tensor(best_by_brute_force(weights[t]))
    return naive, assignment


@pytest.mark.parametrize("sweeps", [1, 6])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_fit_equals_the_naive_transcription(schedule, prior, sweeps):
    """Also shows that Adam is dense and torch's: candidates that lost their match keep moving in both."""
    rng = np.random.default_rng(1)
    base = 0.3 * rng.normal(size=(PROMPTS, WIDTH))
    sets = torch.from_numpy(base + 0.1 * rng.normal(size=(CLIENTS, PROMPTS, WIDTH)))
    settings = GenerativeSettings(schedule=schedule, prior=prior, sweeps=sweeps, lr=0.02, hidden=HIDDEN)
    naive, assignment = naive_fit(sets, settings, seed=2)
    result = aggregate_sets(sets, settings, np.random.default_rng(2))
    used = assignment.unique()
    assert torch.equal(used[result.assignment], assignment)
    torch.testing.assert_close(result.pool, naive.phi.detach()[used], rtol=1e-8, atol=1e-9)
    total = naive_total(naive, sets, assignment, prior)
    assert result.metrics["objective"] == pytest.approx(total.item(), rel=1e-8)


def test_metrics_are_what_their_names_say():
    sets = torch.from_numpy(np.random.default_rng(3).normal(size=(CLIENTS, PROMPTS, WIDTH)))
    settings = GenerativeSettings(sweeps=4, lr=0.05, hidden=HIDDEN)
    result = aggregate_sets(sets, settings, np.random.default_rng(4))
    naive, assignment = naive_fit(sets, settings, seed=4)
    used = assignment.unique().tolist()
    means = torch.stack([sets[assignment == k].mean(0) for k in used])
    likelihoods, margins = [], []
    for t, j in itertools.product(range(CLIENTS), range(PROMPTS)):
        likelihoods.append(naive.log_normal(sets[t, j], assignment[t, j]).item())
        row = naive.weights(sets[t], indicators(assignment[t], CLIENTS * PROMPTS), "odds")[j]
        others = [row[k] for k in range(CLIENTS * PROMPTS) if k != assignment[t, j]]
        margins.append((row[assignment[t, j]] - max(others)).item())
    drift = (naive.phi.detach()[used] - means).square().mean().sqrt().item()
    _, one_less = naive_fit(sets, GenerativeSettings(sweeps=3, lr=0.05, hidden=HIDDEN), seed=4)
    expected = {
        "pool_size": len(used),
        "clients_per_candidate": CLIENTS * PROMPTS / len(used),
        "log_likelihood": np.mean(likelihoods),
        "margin": np.mean(margins),
        "drift": drift,
        "drift_relative": drift / sets.square().mean().sqrt().item(),
        "sigma_min": naive.sigma(naive.phi[used]).min().item(),
        "changed": (assignment != one_less).double().mean().item(),
        "objective": naive_total(naive, sets, assignment, "odds").item(),
    }
    assert result.metrics == pytest.approx(expected, rel=1e-8)


def planted(noise: float = 0.1) -> tuple[torch.Tensor, np.ndarray]:
    problem = recovery.Planted(clients=4, prompts=6, width=128, scale=0.03, noise=noise)
    return problem.draw(np.random.default_rng(5))


@pytest.mark.parametrize("noise", [0.01, 0.1])
@pytest.mark.parametrize("prior", PRIORS)
def test_planted_correspondences_are_recovered_at_the_scale_where_prompts_start(prior, noise):
    sets, origin = planted(noise)
    result = aggregate_sets(sets, GenerativeSettings(prior=prior), np.random.default_rng(0))
    recall, precision = recovery.pair_agreement(result.assignment.numpy(), origin)
    assert recall >= 0.95
    assert precision >= 0.95


def test_far_apart_prompts_stay_their_own_candidates():
    """At scale 1 a client's own copies win by hundreds of nats: nothing merges, and no pair is invented."""
    sets, _ = recovery.Planted(clients=4, prompts=6, width=128, scale=1.0, noise=0.33).draw(np.random.default_rng(5))
    result = aggregate_sets(sets, GenerativeSettings(), np.random.default_rng(0))
    assert result.metrics["pool_size"] == 24
    assert result.metrics["drift_relative"] < 0.01
    torch.testing.assert_close(result.pool[result.assignment], sets, rtol=0, atol=0.05)


def test_order_of_prompts_within_a_client_does_not_change_who_corresponds():
    sets, origin = planted()
    order = np.array([3, 0, 5, 1, 4, 2])
    shuffled, shuffled_origin = sets.clone(), origin.copy()
    shuffled[1], shuffled_origin[1] = sets[1, order], origin[1, order]
    first = aggregate_sets(sets, GenerativeSettings(), np.random.default_rng(0)).assignment.numpy()
    second = aggregate_sets(shuffled, GenerativeSettings(), np.random.default_rng(0)).assignment.numpy()

    def together(assignment: np.ndarray, origins: np.ndarray) -> set[frozenset[tuple[int, int]]]:
        groups: dict[int, set[tuple[int, int]]] = {}
        for (t, j), candidate in np.ndenumerate(assignment):
            groups.setdefault(int(candidate), set()).add((t, int(origins[t, j])))
        return {frozenset(group) for group in groups.values()}

    assert not np.array_equal(first, second)
    assert together(first, origin) == together(second, shuffled_origin)


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_same_input_gives_the_same_bytes_and_leaves_the_global_generator_alone(schedule):
    sets, _ = planted()
    settings = GenerativeSettings(schedule=schedule, sweeps=5)
    before = torch.get_rng_state(), sets.clone()
    first = aggregate_sets(sets, settings, np.random.default_rng(1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(sets, before[1])
    torch.rand(1)
    second = aggregate_sets(sets, settings, np.random.default_rng(1))
    assert first.pool.numpy().tobytes() == second.pool.numpy().tobytes()
    assert torch.equal(first.assignment, second.assignment)
    assert first.metrics == second.metrics
    other = aggregate_sets(sets, settings, np.random.default_rng(2))
    assert first.pool.numpy().tobytes() != other.pool.numpy().tobytes()


def test_a_pool_can_be_learned_from_and_changed():
    """A fit runs in inference mode; what it leaves must not be bound to it."""
    result = aggregate_sets(planted()[0], GenerativeSettings(sweeps=2), np.random.default_rng(0))
    pool = result.pool.clone().requires_grad_()
    (pool * result.pool).sum().backward()
    assert torch.equal(pool.grad, result.pool)
    result.pool.zero_()
    result.assignment.zero_()


def test_assignment_is_one_to_one_within_a_client_and_every_pool_prompt_is_used():
    sets = torch.from_numpy(np.random.default_rng(6).normal(scale=0.05, size=(5, 4, 16))).float()
    result = aggregate_sets(sets, GenerativeSettings(sweeps=7), np.random.default_rng(0))
    assert result.assignment.dtype == torch.int64
    assert result.pool.dtype == torch.float32
    for row in result.assignment:
        assert len(row.unique()) == len(row)
    assert result.assignment.unique().tolist() == list(range(len(result.pool)))


@pytest.mark.parametrize("shape", [(1, 6, 16), (1, 1, 3)])
def test_a_single_client_keeps_its_number_of_prompts(shape):
    sets = torch.from_numpy(np.random.default_rng(7).normal(scale=0.1, size=shape)).float()
    result = aggregate_sets(sets, GenerativeSettings(sweeps=5), np.random.default_rng(0))
    assert len(result.pool) == shape[1]
    assert all(math.isfinite(value) for value in result.metrics.values())


def test_max_size_keeps_the_most_used_candidates_and_drops_the_others_prompts():
    sets = torch.from_numpy(np.random.default_rng(8).normal(scale=0.05, size=(5, 6, 8))).float()
    settings = GenerativeSettings(prior="reference", sweeps=3)
    free = aggregate_sets(sets, settings, np.random.default_rng(0))
    users = np.bincount(free.assignment.flatten())
    assert len(set(users)) > 1  # or the test would not see which are kept
    keep = sorted(sorted(range(len(users)), key=lambda k: (-users[k], k))[:8])
    capped = aggregate_sets(sets, settings, np.random.default_rng(0), max_size=8)
    assert torch.equal(capped.pool, free.pool[keep])
    place = {k: i for i, k in enumerate(keep)}
    assert capped.assignment.flatten().tolist() == [place.get(k, -1) for k in free.assignment.flatten().tolist()]
    assert capped.metrics["pool_size"] == 8
    assert capped.metrics["clients_per_candidate"] == pytest.approx(users[keep].mean())
    roomy = aggregate_sets(sets, settings, np.random.default_rng(0), max_size=1000)
    assert torch.equal(roomy.pool, free.pool)


def test_pair_agreement_counts_pairs():
    origin = np.array([[0, 1], [1, 0], [0, 1]])
    assert recovery.pair_agreement(np.array([[5, 7], [7, 5], [5, 7]]), origin) == (1.0, 1.0)
    recall, precision = recovery.pair_agreement(np.array([[0, 1], [2, 3], [4, 5]]), origin)
    assert recall == 0
    assert math.isnan(precision)
    assert recovery.pair_agreement(np.array([[0, 1], [0, 2], [3, -1]]), origin) == (0.0, 0.0)
    # of 6 true pairs one is found, and one of the two merged pairs is wrong
    assert recovery.pair_agreement(np.array([[0, 1], [1, 2], [1, 9]]), origin) == (1 / 6, 1 / 3)


@pytest.mark.parametrize(
    ("wrong", "named_key"),
    [
        ({"schedule": "sequental"}, "schedule"),
        ({"prior": "flat"}, "prior"),
        ({"sweeps": 0}, "sweeps"),
        ({"hidden": 0}, "hidden"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
    ],
)
def test_settings_out_of_range_are_named(wrong, named_key):
    with pytest.raises(InputError, match=f"^{named_key}: .* not allowed"):
        GenerativeSettings(**wrong)


def test_sets_and_cap_that_make_no_sense_are_refused():
    sets = torch.zeros(2, 2, 3)
    with pytest.raises(InputError, match=r"^max_size: 0"):
        aggregate_sets(sets, GenerativeSettings(), np.random.default_rng(0), max_size=0)
    sets[1, 1, 1] = math.nan
    for bad in (sets, torch.zeros(2, 0, 3), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="finite and of shape"):
            aggregate_sets(bad, GenerativeSettings(), np.random.default_rng(0))


def test_recovery_benchmark_writes_every_row(tmp_path, capsys):
    recovery.main(tmp_path / "recovery.json", quick=True)
    rows = json.loads((tmp_path / "recovery.json").read_text())
    assert len(rows) == 3 * 3 * (2 * 3 + 1)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 2
