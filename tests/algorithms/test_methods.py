"""What the methods do with updates, by hand-made updates; and the reference points on a tiny run."""

import numpy as np
import pytest
import torch
from tiny import TINY

from fedprompt.algorithms import registry
from fedprompt.algorithms.base import Algorithm, Setting, State
from fedprompt.algorithms.fedavg import FedAvg
from fedprompt.algorithms.pfpt.pfpt import PFPT, PFPTSettings
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.optimizers import SGD
from fedprompt.client.tasks import Update, steps_of
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data, build_model
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import run_in_process
from fedprompt.seeding import Stream, generator


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def make(name, **setting):
    cls = registry.get(name)
    return cls(cls.Settings(), Setting(**{"clients": 6, "cohort": 3, **setting}))


def update(client, samples, params, selected=None):
    return Update(client=client, samples=samples, steps=1, params=params, selected=selected, loss=0.0)


def two_tensors(prompt, head):
    return {"prompt": torch.tensor([[prompt]]), "head.1.bias": torch.tensor([head])}


def tiny_run(folder, *overrides):
    """Records and last state of a tiny run."""
    records = list(run_in_process(load(None, [*TINY, *overrides]), folder))
    return records, CheckpointStore(str(folder / "checkpoints")).latest().state


def test_all_methods_are_listed_by_name_with_a_line_about_each():
    methods = registry.available()
    names = [method.name for method in methods]
    assert names == sorted(names)
    assert set(names) >= {"pfpt", "fedavg", "head", "frozen", "centralized", "local"}
    assert all(method.about and "\n" not in method.about for method in methods)


def test_a_method_registers_under_its_name(registries):
    @registry.algorithm("mine", "a method of mine")
    class Mine(FedAvg):
        """A method of mine."""

    assert registry.get("mine") is Mine
    assert Mine in registry.available()
    assert load(None, ["algorithm.name=mine"]).algorithm.name == "mine"


def test_an_unknown_method_is_told_with_the_nearest_and_all_there_are():
    with pytest.raises(InputError, match=r"'fedavgg' \(did you mean 'fedavg'\?\); allowed: .*pfpt"):
        registry.get("fedavgg")


def test_fedavg_is_the_mean_by_number_of_samples(rng):
    updates = [update(1, 10, two_tensors(1.0, -3.0)), update(4, 30, two_tensors(5.0, 1.0))]
    state, _ = make("fedavg").aggregate(State(two_tensors(0.0, 0.0)), updates, rng)
    assert state.params["prompt"].item() == pytest.approx((10 * 1 + 30 * 5) / 40)
    assert state.params["head.1.bias"].item() == pytest.approx((10 * -3 + 30 * 1) / 40)
    assert state.params["prompt"].dtype == torch.float32
    assert state.clients == {}


def test_everybody_starts_from_the_global_params(rng):
    algorithm = make("fedavg")
    state = algorithm.init(two_tensors(2.0, 3.0), rng)
    assert algorithm.broadcast(state, 5) == state.params


@pytest.mark.parametrize("name", ["fedavg", "frozen"])
def test_personal_heads_stay_with_their_client(rng, name):
    algorithm = make(name, personal_head=True)
    state = algorithm.init(two_tensors(0.0, 7.0), rng)
    updates = [update(1, 10, two_tensors(1.0, -3.0)), update(4, 30, two_tensors(5.0, 1.0))]
    state, _ = algorithm.aggregate(state, updates, rng)
    for client, head in ((1, -3.0), (4, 1.0)):
        assert algorithm.broadcast(state, client)["head.1.bias"].item() == head
        assert algorithm.broadcast(state, client)["prompt"].item() == 4.0
    state, _ = algorithm.aggregate(state, [update(1, 10, two_tensors(2.0, -2.0))], rng)
    assert algorithm.broadcast(state, 1)["head.1.bias"].item() == -2.0
    assert algorithm.broadcast(state, 4)["head.1.bias"].item() == 1.0


def test_a_client_that_comes_late_gets_nothing_of_the_others_heads(rng):
    algorithm = make("fedavg", personal_head=True)
    state = algorithm.init(two_tensors(0.0, 7.0), rng)
    state, _ = algorithm.aggregate(state, [update(1, 10, two_tensors(1.0, -3.0))], rng)
    late = algorithm.broadcast(state, 2)
    assert (late["prompt"].item(), late["head.1.bias"].item()) == (1.0, 7.0)


@pytest.mark.runs
def test_personal_heads_do_not_travel(tmp_path):
    shared, _ = tiny_run(tmp_path / "shared", "algorithm.name=fedavg")
    personal, state = tiny_run(tmp_path / "personal", "algorithm.name=fedavg", "head.personal=true")
    prompt = 3 * 10 * 64 * 4
    assert personal[1]["communication"] == {"up_bytes": prompt, "down_bytes": prompt}
    assert shared[1]["communication"]["up_bytes"] > prompt
    assert state.clients.keys() == set(personal[1]["cohort"]) | set(personal[2]["cohort"])
    assert all(name.startswith("head.") for kept in state.clients.values() for name in kept)


def test_head_only_has_no_prompts(tmp_path):
    records, state = tiny_run(tmp_path, "algorithm.name=head")
    assert all(name.startswith("head.") for name in state.params)
    assert records[-1]["result"]["pool_size"] is None


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["prompt", "deep", "pool"])
def test_frozen_prompts_stay_bit_for_bit_and_are_not_sent_back(tmp_path, kind):
    records, state = tiny_run(tmp_path, "algorithm.name=frozen", f"prompt.kind={kind}")
    before = torch.load(tmp_path / "checkpoints" / "round_000001.pt", weights_only=True)["state"]["params"]
    for name, value in state.params.items():
        assert torch.equal(value, before[name]) == (not name.startswith("head."))
    sizes = {name: value.numel() * 4 for name, value in state.params.items()}
    sent = records[1]["communication"]
    assert sent["down_bytes"] == 3 * sum(sizes.values())
    assert sent["up_bytes"] == 3 * sum(size for name, size in sizes.items() if name.startswith("head."))


@pytest.mark.runs
@pytest.mark.parametrize("name", ["fedsgd", "scaffold", "pfedpg", "dfedavg"])
def test_a_frozen_query_projection_stays_bit_for_bit(tmp_path, name):
    _, state = tiny_run(tmp_path, f"algorithm.name={name}", "prompt.kind=pool", "prompt.query=frozen")
    start = build_model(load(None, TINY), 10).init(generator(0, Stream.INIT))["query_proj"]
    assert torch.equal(state.params["query_proj"], start)
    assert all(torch.equal(own["query_proj"], start) for own in state.clients.values() if "query_proj" in own)


def test_no_method_sends_or_trains_a_frozen_query_projection():
    for method in registry.available():
        if "pool" in method.kinds:
            frozen, trained = (
                build_algorithm(
                    load(None, [f"algorithm.name={method.name}", "prompt.kind=pool", f"prompt.query={query}"])
                )
                for query in ("frozen", "trained")
            )
            assert not frozen.travels("query_proj")
            assert not frozen.trains("query_proj")
            assert trained.travels("query_proj") == (method.name not in ("local", "centralized"))
            assert frozen.travels("pool") == trained.travels("pool")


@pytest.mark.runs
def test_the_query_projection_is_trained_and_sent_unless_told_otherwise(tmp_path):
    start = build_model(load(None, TINY), 10).init(generator(0, Stream.INIT))["query_proj"]
    sent = {}
    for query in ("trained", "frozen", "identity"):
        options = ["algorithm.sweeps=2", "federation.rounds=1", f"prompt.query={query}"]
        records, state = tiny_run(tmp_path / query, *options)
        sent[query] = records[1]["communication"]["up_bytes"]
        assert ("query_proj" in state.params) == (query != "identity")
        if query != "identity":
            assert torch.equal(state.params["query_proj"], start) == (query == "frozen")
    assert sent["frozen"] == sent["identity"] == sent["trained"] - 3 * 64 * 64 * 4


def test_centralized_is_one_client_with_all_data_and_a_cohorts_steps(tmp_path):
    config = load(None, [*TINY, "algorithm.name=centralized", "partition.kind=iid", "local.epochs=2"])
    data, apart = build_data(config), build_data(load(None, [*TINY, "algorithm.name=fedavg", "partition.kind=iid"]))
    assert sorted(data.clients[0]) == list(range(len(data.train)))
    assert len(data.clients) == 1
    central = steps_of(len(data.train), make("centralized").epochs(2), 16)
    of_cohort = 3 * steps_of(int(apart.sizes.mean()), 2, 16)
    assert central == pytest.approx(of_cohort, rel=0.25)
    records, state = tiny_run(tmp_path, "algorithm.name=centralized")
    assert [record["cohort"] for record in records[1:-1]] == [[0], [0]]
    assert records[1]["communication"] == {"up_bytes": 0, "down_bytes": 0}
    assert state.clients == {}


def test_local_clients_share_nothing_and_differ(tmp_path):
    records, state = tiny_run(tmp_path, "algorithm.name=local")
    result = records[-1]["result"]
    assert (result["communication"]["up_bytes"], result["communication"]["down_bytes"]) == (0, 0)
    first, second = sorted(state.clients)[:2]
    for name, start in state.params.items():
        assert not torch.equal(state.clients[first][name], state.clients[second][name])
        assert not torch.equal(state.clients[first][name], start)
    before = torch.load(tmp_path / "checkpoints" / "round_000001.pt", weights_only=True)["state"]["params"]
    assert all(torch.equal(before[name], value) for name, value in state.params.items())


def pools(rng, clients, prompts, width=8, spread=0.01):
    base = torch.from_numpy(rng.normal(0, 0.03, (prompts, width))).float()
    return base, [base + spread * torch.from_numpy(rng.normal(size=base.shape)).float() for _ in range(clients)]


def pfpt(max_pool=None, sweeps=2, candidates="cohort", **setting):
    settings = PFPTSettings(sweeps=sweeps, max_pool=max_pool, candidates=candidates)
    return PFPT(settings, Setting(**{"clients": 6, "cohort": 2, **setting}))


def used(prompts, *indices):
    return torch.tensor([i in indices for i in range(prompts)])


def test_pfpt_aggregates_what_any_client_used_and_averages_the_rest(rng):
    base, (a, b) = pools(rng, 2, 5)
    other = {"query_proj": torch.ones(8, 8)}
    updates = [
        update(0, 10, {"pool": a, **other}, used(5, 0, 2)),
        update(3, 30, {"pool": b, "query_proj": torch.full((8, 8), 5.0)}, used(5, 2, 4)),
    ]
    state, metrics = pfpt().aggregate(State({"pool": base, **other}), updates, rng)
    assert metrics["used"] == 3  # 0, 2 and 4
    assert torch.allclose(state.params["query_proj"], torch.full((8, 8), (10 * 1 + 30 * 5) / 40))
    assert len(state.params["pool"]) == metrics["pool_size"]
    assert 3 <= metrics["pool_size"] <= 6
    unused = torch.stack([a[1], b[1], a[3], b[3]])
    assert torch.cdist(state.params["pool"], unused).min() > 0.01  # φ moves by 1e-3 a step from where it starts


def test_pfpts_new_pool_is_that_of_the_next_broadcast(rng):
    base, versions = pools(rng, 2, 5, spread=1.0)
    updates = [update(i, 10, {"pool": pool}, used(5, *range(5))) for i, pool in enumerate(versions)]
    algorithm = pfpt()
    state, metrics = algorithm.aggregate(State({"pool": base}), updates, rng)
    assert len(algorithm.broadcast(state, 4)["pool"]) == metrics["pool_size"]


def test_pfpts_pool_is_capped_where_the_user_says_so(rng):
    base, versions = pools(rng, 4, 5, spread=1.0)
    updates = [update(i, 10, {"pool": pool}, used(5, *range(5))) for i, pool in enumerate(versions)]
    free, _ = pfpt().aggregate(State({"pool": base}), updates, np.random.default_rng(1))
    capped, metrics = pfpt(max_pool=6).aggregate(State({"pool": base}), updates, np.random.default_rng(1))
    assert len(free.params["pool"]) > 6
    assert len(capped.params["pool"]) == metrics["pool_size"] == 6


def test_pfpt_takes_what_served_the_test_set_only_where_it_is_told_to(rng):
    base = torch.randn(6, 4)
    served = np.array([False, False, False, False, True, True])
    updates = [update(c, 10, {"pool": base.clone()}, torch.arange(6) < 3) for c in range(2)]
    for candidates, used in (("cohort", 3.0), ("cohort+test", 5.0)):
        algorithm = pfpt(candidates=candidates)
        state = algorithm.after_test(State({"pool": base}), served)
        state, metrics = algorithm.aggregate(state, updates, rng)
        assert metrics["used"] == used
        assert not state.memory  # those are prompts of a pool that is no more


@pytest.mark.runs
def test_looking_at_the_test_set_changes_a_run_only_under_its_name(tmp_path):
    _, honest = tiny_run(tmp_path / "a", "algorithm.sweeps=2")
    _, looked = tiny_run(tmp_path / "b", "algorithm.sweeps=2", "algorithm.candidates=cohort+test")
    assert not honest.memory
    assert looked.memory["served_in_test"].shape == (len(looked.params["pool"]),)


def test_pfpts_cap_below_what_a_batch_takes_is_refused():
    with pytest.raises(InputError, match=r"algorithm\.max_pool: 2 is less than prompt\.top_k = 3"):
        pfpt(max_pool=2, top_k=3)


@pytest.mark.parametrize(
    ("size", "told"), [(3, "shrunk to 3"), (2, "shrunk to 2"), (4, None), (18, None), (19, "from 6 to 19")]
)
def test_pfpt_warns_when_the_pool_collapses_or_grows_without_end(size, told):
    lines = pfpt(top_k=3, pool_size=6).warnings({"pool_size": float(size)})
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


def test_a_pool_that_starts_at_what_a_batch_takes_is_no_reason_to_warn():
    assert pfpt(top_k=6, pool_size=6).warnings({"pool_size": 6.0}) == []


def test_the_rule_is_the_configurations_optimizer():
    assert isinstance(make("fedavg").rule(LocalOptions(optimizer="sgd"), 1), SGD)


def test_the_base_class_does_not_pretend_to_aggregate(rng):
    with pytest.raises(NotImplementedError):
        Algorithm(None, Setting(2, 1)).aggregate(State({}), [], rng)
