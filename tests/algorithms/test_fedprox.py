"""FedProx against rounds by hand, its pull against autograd, and FedAvg as its limit."""

import numpy as np
import pytest
import torch
from by_hand import (
    BIAS,
    RATE,
    SGD,
    SIZES,
    Bowl,
    arrays,
    assert_near,
    combined,
    drawn,
    linear,
    make,
    mean,
    play,
    same,
    start_of,
    tiny_run,
    walk,
)

from fedprompt.client.rules.base import LocalOptions

COHORT = [0, 2, 4, 5]
MU = 0.7


def proximal_step(anchor, form):
    """SGD on the loss with the proximal term."""

    def step(params, grads, opens_epoch):
        away = combined(np.subtract, params, anchor)
        norm = np.sqrt(sum(np.sum(a**2) for a in away.values()))
        pull = MU if form == "paper" else 0.0 if opens_epoch or norm == 0 else MU / 2 / norm
        return combined(lambda w, g, a: w - RATE * (g + pull * a), params, grads, away)

    return step


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_two_rounds_equal_the_formula_in_float64(make_model, form):
    model = linear(make_model)
    algorithm = make("fedprox", mu=MU, form=form)
    state = algorithm.init(start_of(model), None)
    state, _ = play(algorithm, model, state, [1, 3], round=1)
    x = arrays(state.params)
    for round in (2, 3):
        state, updates = play(algorithm, model, state, COHORT, round)
        walks = [walk(x, client, round, proximal_step(x, form)) for client in COHORT]
        for update, (end, steps, loss) in zip(updates, walks, strict=True):
            assert_near(update.params, end)
            assert update.steps == steps
            assert update.loss == pytest.approx(loss, rel=1e-6)  # of the data alone, without the proximal term
        x = mean([end for end, _, _ in walks], [SIZES[client] for client in COHORT])
        assert_near(state.params, x)


@pytest.mark.parametrize(("form", "equal"), [("reference", True), ("paper", False)])
def test_only_the_published_codes_form_pulls_nobody_in_the_first_round(make_model, form, equal):
    model = linear(make_model)
    start = start_of(model)
    ends = {}
    for name, settings in (("fedavg", {}), ("fedprox", {"mu": MU, "form": form})):
        algorithm = make(name, **settings)
        ends[name] = play(algorithm, model, algorithm.init(start, None), COHORT, round=1)[0].params
    assert same(ends["fedavg"], ends["fedprox"]) == equal


TERMS = {
    "paper": lambda away: MU / 2 * sum(a.square().sum() for a in away.values()),
    "reference": lambda away: MU / 2 * torch.cat([a.flatten() for a in away.values()]).norm(),
}


@pytest.mark.parametrize("form", TERMS)
def test_the_pull_is_the_gradient_of_every_clients_own_term(form):
    away = drawn(0)
    pulls = make("fedprox", mu=MU, form=form).pull(away, torch.zeros(3, dtype=torch.bool))
    for client in range(3):
        leaves = {name: value[client].clone().requires_grad_() for name, value in away.items()}
        grads = torch.autograd.grad(TERMS[form](leaves), list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(pulls[name][client], grad, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("form", TERMS)
def test_adam_walks_on_the_loss_with_the_term(form):
    start, targets, options = drawn(1), drawn(2), LocalOptions(lr=0.1, prompt_lr=0.1)
    rule = make("fedprox", mu=MU, form=form).rule(options, 2)
    params, slots = start, rule.start(start, {}, {})
    for step in range(5):
        params, slots, _ = rule.step(params, slots, Bowl(targets, [step == 0] * 3))
    for client in range(3):
        own = {name: value[client].clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.Adam(own.values(), lr=0.1, betas=options.betas, eps=options.eps)
        for step in range(5):
            optimizer.zero_grad()
            loss = sum((w - targets[n][client]).square().sum() / 2 for n, w in own.items())
            if step > 0:  # in the paper's form the term's gradient is 0 there anyway
                loss = loss + TERMS[form]({n: w - start[n][client] for n, w in own.items()})
            loss.backward()
            optimizer.step()
        for name, value in own.items():
            torch.testing.assert_close(params[name][client], value.detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("form", TERMS)
@pytest.mark.parametrize("distance", [0.0, 1e-42])
def test_where_a_client_has_not_moved_the_pull_is_nothing_and_no_nan(form, distance):
    moved = {name: value.float() for name, value in drawn(0).items()}
    away = {name: torch.cat([torch.full_like(value[:1], distance), value[1:]]) for name, value in moved.items()}
    pulls = make("fedprox", mu=MU, form=form).pull(away, torch.zeros(3, dtype=torch.bool))
    for name, pull in pulls.items():
        assert pull[0].abs().max() < 1e-3
        assert torch.isfinite(pull).all()
        assert pull[1:].abs().min() > 0, name


def test_the_published_codes_form_leaves_out_who_is_at_an_epochs_first_batch():
    algorithm = make("fedprox", mu=MU, form="reference")
    away, opens = drawn(0), torch.tensor([False, True, False])
    some, everybody = algorithm.pull(away, opens), algorithm.pull(away, torch.zeros_like(opens))
    for name in away:
        assert torch.equal(some[name][1], torch.zeros_like(some[name][1]))
        assert torch.equal(some[name][[0, 2]], everybody[name][[0, 2]])


@pytest.mark.parametrize("form", TERMS)
def test_personal_heads_are_not_pulled_and_count_for_nothing(form):
    away, opens = drawn(0), torch.zeros(3, dtype=torch.bool)
    algorithm = make("fedprox", {"personal_head": True}, mu=MU, form=form)
    pulls = algorithm.pull(away, opens)
    assert not pulls[BIAS].any()
    alone = make("fedprox", mu=MU, form=form).pull({"prompt": away["prompt"]}, opens)
    assert torch.equal(pulls["prompt"], alone["prompt"])
    assert alone["prompt"].any()


def test_the_larger_mu_the_nearer_stay_the_clients(make_model):
    model, distances = linear(make_model), []
    for mu in (0.0, 0.1, 1.0):
        algorithm = make("fedprox", mu=mu)
        state = algorithm.init(start_of(model), None)
        _, updates = play(algorithm, model, state, COHORT, round=1, options=SGD)
        distances.append([sum((u.params[n] - w).norm() for n, w in state.params.items()) for u in updates])
    for free, light, firm in zip(*distances, strict=True):
        assert free > light > firm > 0


@pytest.mark.parametrize("name", ["fedmem", "pfpt-map", "pfpt-mem"])
def test_others_pull_their_clients_as_fedprox_does_where_mu_says_so(name):
    start, targets = drawn(1), drawn(2)
    ends = {}
    for method, mu in (("fedprox", MU), ("fedavg", None), (name, MU), (name, None)):
        rule = make(method, **({} if mu is None else {"mu": mu})).rule(LocalOptions(lr=0.1), 1)
        params, slots = start, rule.start(start, {}, {})
        for step in range(4):
            params, slots, _ = rule.step(params, slots, Bowl(targets, [step == 0] * 3))
        ends[method, mu] = params
    assert same(ends[name, MU], ends["fedprox", MU])
    assert same(ends[name, None], ends["fedavg", None])
    assert not same(ends[name, MU], ends[name, None])


@pytest.mark.runs
@pytest.mark.parametrize("form", TERMS)
def test_without_a_pull_a_run_is_fedavg_bit_for_bit(tmp_path, form):
    _, plain = tiny_run(tmp_path / "a", "algorithm.name=fedavg")
    _, weightless = tiny_run(tmp_path / "b", "algorithm.name=fedprox", "algorithm.mu=0", f"algorithm.form={form}")
    assert same(plain.params, weightless.params)


@pytest.mark.runs
def test_with_a_pull_a_run_is_not_fedavg(tmp_path):
    _, plain = tiny_run(tmp_path / "a", "algorithm.name=fedavg")
    records, pulled = tiny_run(tmp_path / "b", "algorithm.name=fedprox", "algorithm.mu=1")
    assert not same(plain.params, pulled.params)
    assert "result" in records[-1]
