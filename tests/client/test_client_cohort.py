"""Clients that train together get what each of them gets alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedprompt.client.batches import plan_batches
from fedprompt.client.examples import prepare
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.tasks import Task, Training, steps_of
from fedprompt.client.train import train_group
from fedprompt.models.heads.classifier import HeadOptions

SIZES = {3: 7, 8: 23, 11: 16, 20: 5}  # client: samples; with batches of 8: 1, 3, 2 and 1 steps per epoch, most ragged
KINDS = {
    "none": {"kind": "none"},
    "prompt": {"kind": "prompt"},
    "deep": {"kind": "deep", "layer": 1},
    "pool by batch": {"kind": "pool", "similarity": 0.3},
    "pool by instance": {"kind": "pool", "similarity": 0.3, "selection": "instance", "layer": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
OPTIMIZERS = {
    "adam": LocalOptions(lr=2e-3, prompt_lr=5e-3),
    "sgd": LocalOptions(optimizer="sgd", lr=0.05, prompt_lr=0.5),
    "momentum": LocalOptions(optimizer="sgd", lr=0.02, prompt_lr=0.3, momentum=0.9),
}


def training(options: LocalOptions = OPTIMIZERS["adam"], **changes) -> Training:
    return replace(Training(make_rule(options), 8, lambda name: True, seed=1, round=4), **changes)


@pytest.fixture
def cohort(make_examples):
    """Tasks and data of four clients, each with params and a number of epochs of its own."""

    def make(model, epochs=(2, 2, 2, 2)):
        tasks = [
            Task(client, model.init(np.random.default_rng(client)), epochs=e)
            for (client, e) in zip(SIZES, epochs, strict=True)
        ]
        data = [prepare(model, make_examples(n, seed=client), True) for client, n in SIZES.items()]
        return tasks, data

    return make


def alone(model, tasks, data, how):
    return [train_group(model, [task], [examples], how)[0] for task, examples in zip(tasks, data, strict=True)]


def assert_same(one, other, atol=2e-5):
    assert (one.client, one.samples, one.steps) == (other.client, other.samples, other.steps)
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert set(one.params) == set(other.params)
    for name, value in one.params.items():
        torch.testing.assert_close(value, other.params[name], atol=atol, rtol=0)
    assert (one.selected is None) == (other.selected is None)
    if one.selected is not None:
        assert torch.equal(one.selected, other.selected)


@every_kind
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_fused_equals_one_by_one(make_model, cohort, kind, options):
    model = make_model(**kind)
    tasks, data = cohort(model)
    fused = train_group(model, tasks, data, training(options))
    for task, update, expected in zip(tasks, fused, alone(model, tasks, data, training(options)), strict=True):
        assert_same(update, expected)
        for name, start in task.params.items():  # by far more than the tolerance
            assert (update.params[name] - start).abs().max() > 1e-3, name


def test_dropout_is_on_in_these_comparisons(make_model, cohort):
    with_dropout, without = make_model(), make_model(head=HeadOptions(hidden=16, dropout=0.0))
    tasks, data = cohort(with_dropout)
    some, none = (train_group(model, tasks, data, training()) for model in (with_dropout, without))
    assert (some[0].params["prompt"] - none[0].params["prompt"]).abs().max() > 1e-4


@every_kind
def test_the_order_of_tasks_does_not_matter_and_updates_come_in_it(make_model, cohort, kind):
    model = make_model(**kind)
    tasks, data = cohort(model)
    expected = {update.client: update for update in train_group(model, tasks, data, training())}
    for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
        updates = train_group(model, [tasks[i] for i in order], [data[i] for i in order], training())
        assert [update.client for update in updates] == [tasks[i].client for i in order]
        for update in updates:
            assert_same(update, expected[update.client])


def test_updates_tell_samples_and_steps_and_share_no_memory_with_the_task(make_model, cohort):
    model = make_model()
    tasks, data = cohort(model, epochs=(1, 2, 0.5, 3))
    start = [{name: value.clone() for name, value in task.params.items()} for task in tasks]
    updates = train_group(model, tasks, data, training())
    assert [update.samples for update in updates] == list(SIZES.values())
    assert [update.steps for update in updates] == [1, 6, 1, 3]
    for task, before, update in zip(tasks, start, updates, strict=True):
        for name, value in before.items():
            assert torch.equal(task.params[name], value)
            assert not update.params[name].requires_grad
            assert update.params[name].untyped_storage().nbytes() == 4 * value.numel()


class Watched:
    """A rule that notes how many clients it steps, and what it is given besides; it replies with the steps made."""

    def __init__(self, rule):
        self.rule, self.active = rule, []

    def start(self, params, sent, kept):
        self.sent, self.kept = sent, kept
        return self.rule.start(params, sent, kept)

    def step(self, params, slots, oracle):
        widths = {len(value) for value in params.values()}
        widths |= {len(value) for values in slots.values() for value in values.values()}
        self.active.append((len(self.active) + 1, *widths))
        self.opens = [*getattr(self, "opens", []), oracle.opens_epoch.tolist()]
        return self.rule.step(params, slots, oracle)

    def finish(self, params, slots, steps):
        ones = torch.ones(len(next(iter(params.values()))), 1)
        return {"steps": ones * steps}, {"prompt": params.get("prompt", ones).clone()}


def test_finished_clients_leave_and_are_stepped_no_more(make_model, cohort):
    model = make_model()
    tasks, data = cohort(model, epochs=(1, 2, 1, 4))  # steps: 1, 6, 2, 4
    watched = Watched(make_rule(OPTIMIZERS["momentum"]))
    updates = train_group(model, tasks, data, training(rule=watched))
    assert watched.active == [(1, 4), (2, 3), (3, 2), (4, 2), (5, 1), (6, 1)]
    for update, expected in zip(updates, alone(model, tasks, data, training(OPTIMIZERS["momentum"])), strict=True):
        assert_same(update, expected)


def test_how_long_others_train_changes_nothing(make_model, cohort):
    model = make_model("pool")
    tasks, data = cohort(model)
    short = train_group(model, tasks, data, training())
    longer = [replace(task, epochs=6) if task.client == 8 else task for task in tasks]
    long = train_group(model, longer, data, training())
    for before, after in zip(short, long, strict=True):
        if after.client == 8:
            assert (after.params["pool"] - before.params["pool"]).abs().max() > 2e-3
        else:
            assert_same(after, before)


def test_what_is_sent_and_kept_reaches_the_rule_in_the_order_of_the_stacked_clients(make_model, cohort):
    model = make_model()
    tasks, data = cohort(model)
    watched = Watched(make_rule(OPTIMIZERS["sgd"]))
    tasks = [replace(task, sent={"mark": torch.tensor([float(task.client)])}) for task in tasks]
    tasks = [replace(t, kept={"seen": torch.tensor([2.0])}) if t.client == 3 else t for t in tasks]
    train_group(model, tasks, data, training(rule=watched))
    assert watched.sent["mark"].flatten().tolist() == [8, 11, 3, 20]  # longest first, equal ones as they came
    assert watched.kept["seen"].flatten().tolist() == [0, 0, 2, 0]  # who comes for the first time has zeros


def test_what_the_rule_leaves_behind_comes_with_its_own_client(make_model, cohort):
    model = make_model()
    tasks, data = cohort(model, epochs=(1, 2, 1, 4))  # steps: 1, 6, 2, 4
    updates = train_group(model, tasks, data, training(rule=Watched(make_rule(OPTIMIZERS["sgd"]))))
    assert [update.reply["steps"].item() for update in updates] == [1, 6, 2, 4]
    for update in updates:
        assert torch.equal(update.kept["prompt"], update.params["prompt"])


def test_rules_are_told_where_an_epoch_begins(make_model, cohort):
    model = make_model()
    tasks, data = cohort(model, epochs=(1, 2, 1, 4))  # 1, 3, 2 and 1 batches an epoch
    watched = Watched(make_rule(OPTIMIZERS["sgd"]))
    train_group(model, tasks, data, training(rule=watched))
    second, fourth = [[opens[0] for opens in watched.opens], [opens[1] for opens in watched.opens[:4]]]
    assert second == [True, False, False, True, False, False]
    assert fourth == [True] * 4


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.backbone.vit.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@every_kind
def test_the_backbone_never_changes(make_model, cohort, kind):
    model = make_model(**kind)
    tasks, data = cohort(model)
    before = fingerprint(model)
    updates = train_group(model, tasks, data, training())
    assert fingerprint(model) == before
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.vit.parameters())
    assert not model.backbone.vit.training
    for update in updates:
        assert set(update.params) == set(model.init(np.random.default_rng(0)))


@pytest.mark.parametrize("kind", ["prompt", "deep", "pool"])
def test_what_is_not_trained_stays_to_the_bit(make_model, cohort, kind):
    model = make_model(kind)
    tasks, data = cohort(model)
    updates = train_group(model, tasks, data, training(trains=lambda name: name.startswith("head.")))
    for task, update in zip(tasks, updates, strict=True):
        for name, value in task.params.items():
            assert torch.equal(update.params[name], value) == (not name.startswith("head."))


def test_selected_prompts_are_those_of_any_batch_and_others_do_not_move(make_model, cohort):
    model = make_model("pool", pool_size=12, top_k=2)
    tasks, data = cohort(model)
    updates = train_group(model, tasks, data, training(OPTIMIZERS["sgd"]))
    for task, update in zip(tasks, updates, strict=True):
        moved = (update.params["pool"] - task.params["pool"]).abs().amax(1) > 0
        assert torch.equal(update.selected, moved)
        assert 2 <= update.selected.sum() <= 2 * update.steps
    assert not updates[1].selected.all()


def test_masked_classes_do_not_move_and_domains_are_per_sample(make_model, make_examples):
    model = make_model("none", head=HeadOptions(kind="linear"))
    allowed = np.array([[True, True, False, False, False], [False, False, True, True, False]])
    data = make_examples(16)
    domains = np.arange(16) % 2
    data = prepare(model, replace(data, domains=domains, labels=2 * domains + data.labels % 2), True)
    task = Task(0, model.init(np.random.default_rng(0)))
    (update,) = train_group(model, [task], [data], training(OPTIMIZERS["sgd"], domain_classes=allowed))
    moved = (update.params["head.1.weight"] - task.params["head.1.weight"]).abs().amax(1) > 0
    assert moved.tolist() == [True, True, True, True, False]
    assert np.isfinite(update.loss)
    (unmasked,) = train_group(model, [task], [data], training(OPTIMIZERS["sgd"]))
    assert unmasked.loss > update.loss  # fewer classes to tell apart


def test_read_only_arrays_of_shared_memory_will_do(make_model, cohort, recwarn):
    model = make_model("pool", layer=1)
    tasks, data = cohort(model)
    expected = train_group(model, tasks[:1], data[:1], training())[0]
    for array in (data[0].labels, data[0].domains, data[0].tokens, data[0].query):
        array.flags.writeable = False
    assert_same(train_group(model, tasks[:1], data[:1], training())[0], expected, atol=0)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize("change", [{"seed": 2}, {"round": 5}])
def test_another_seed_or_round_trains_on_other_batches(make_model, cohort, change):
    model = make_model()
    tasks, data = cohort(model)
    one = train_group(model, tasks, data, training())
    again = train_group(model, tasks, data, training())
    other = train_group(model, tasks, data, training(**change))
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a.params["prompt"], b.params["prompt"])
        assert not torch.allclose(a.params["prompt"], c.params["prompt"], atol=1e-5)


# --- the plan of batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "epochs"), [(1, 1), (7, 2), (8, 3), (9, 1), (23, 5), (23, 0.5), (40, 2.4), (9, 0.1)]
)
def test_the_plan_has_the_promised_number_of_steps(samples, epochs):
    plan = plan_batches(samples, epochs, 8, np.random.default_rng(0))
    assert len(plan) == steps_of(samples, epochs, 8)
    assert all(1 <= len(batch) <= 8 for batch in plan)


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"),
    [(23, 1, 3), (24, 1, 3), (25, 1, 4), (24, 2.5, 8), (40, 2.4, 12), (40, 0.5, 2), (8, 0.1, 1), (3, 5, 5)],
)
def test_steps_by_hand(samples, epochs, steps):
    assert steps_of(samples, epochs, 8) == steps


def test_every_epoch_covers_every_sample_once_in_a_fresh_order():
    plan = plan_batches(23, 3, 8, np.random.default_rng(0))
    assert [len(batch) for batch in plan] == [8, 8, 7] * 3
    epochs = [np.concatenate(plan[start : start + 3]) for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[1] == epochs[2]).all()


def test_a_part_of_an_epoch_is_the_beginning_of_a_whole_one():
    part, whole = (plan_batches(40, epochs, 8, np.random.default_rng(0)) for epochs in (1.6, 2))
    assert len(part) == 8
    for short, long in zip(part, whole, strict=False):
        assert (short == long).all()
    assert len(np.unique(np.concatenate(part[5:]))) == 24
