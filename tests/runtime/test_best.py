"""The model of the best round on validation is kept, and is the right one whatever interrupted the run."""

import json
import shutil

import pytest
import torch

from fedprompt.errors import RunFailed
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.pool import InProcessPool
from fedprompt.runtime.run import new_run, run_in_process
from fedprompt.runtime.scoring import evaluate

LONG = ("federation.rounds=6", "algorithm.name=fedavg", "data.limit=200", "local.lr=0.05", "seed=3")


def begin(runs, name, *overrides):
    with new_run(runs.folder / name, runs.config(*overrides), overwrite=False):
        return runs.local(name, *overrides)[-1]["result"]


def best_of(folder):
    return CheckpointStore(str(folder / "checkpoints")).best()


def scored_again(runs, folder, *overrides):
    """Test accuracy of what was kept."""
    config, best = runs.config(*overrides), best_of(folder)
    data = build_data(config)
    scored, _ = evaluate(InProcessPool(config, data), build_algorithm(config), best.state, data, config.seed)
    return scored


@pytest.fixture(scope="module")
def long(shared_runs):
    """A run whose best round is neither its last nor in its newest checkpoints; its folder and its result."""
    result = begin(shared_runs, "long", *LONG)
    assert 0 < result["best"]["round"] < 5
    return shared_runs.folder / "long", result


def test_the_best_round_is_the_one_that_the_result_tells(long, shared_runs):
    folder, result = long
    best = best_of(folder)
    assert best.round == result["best"]["round"] == best.best.round
    assert scored_again(shared_runs, folder, *LONG)["test"]["accuracy"] == result["best"]["accuracy"]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.pt", "round_000005.pt", "round_000006.pt"]


def test_it_is_never_taken_for_the_newest(long):
    assert CheckpointStore(str(long[0] / "checkpoints")).latest().round == 6


@pytest.mark.parametrize("overrides", [("algorithm.name=pfedpg",), ("head.personal=true", "algorithm.name=scaffold"),
                                       ("algorithm.name=fedmem",), ("algorithm.name=dpsgd",)])  # fmt: skip
def test_clients_own_models_are_kept_without_what_training_needs(runs, overrides):
    overrides = (*overrides, "data.limit=200", "federation.rounds=2")
    result = begin(runs, "run", *overrides)
    scored = scored_again(runs, runs.folder / "run", *overrides)
    assert scored["test"]["accuracy"] == result["best"]["accuracy"]
    kept = best_of(runs.folder / "run").state
    assert not any(name.startswith("rule.") for store in kept.clients.values() for name in store)
    assert "newest" not in kept.memory
    best, newest = (runs.folder / "run" / "checkpoints" / name for name in ("best.pt", "round_000002.pt"))
    assert best.stat().st_size <= newest.stat().st_size


@pytest.mark.parametrize("every", [1, 2, 50])
@pytest.mark.parametrize("round", range(1, 7))
def test_after_a_kill_it_is_that_of_the_checkpoint_that_serves(long, runs, monkeypatch, round, every):
    """Killed between any two writes, at the latest while ``round``'s checkpoint is written."""
    overrides = (*LONG, f"runtime.checkpoint_every={every}")
    folder, save, writes = runs.folder / "run", CheckpointStore.save, []

    def killed(self, checkpoint):
        if checkpoint.round >= round:
            replace = self._replace

            def first_only(name, *rest):
                if not name.endswith("best.pt"):
                    raise SystemExit
                writes.append(name)
                replace(name, *rest)

            self._replace = first_only
        save(self, checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "save", killed)
        with pytest.raises(SystemExit):
            begin(runs, "run", *overrides)
    begun = CheckpointStore(str(folder / "checkpoints")).latest()
    runs_on = run_in_process(runs.config(*overrides), folder)
    next(runs_on, None)
    runs_on.close()
    list(run_in_process(runs.config(*overrides), folder))
    assert begun.round < round
    assert best_of(folder).round == long[1]["best"]["round"]
    for name, value in best_of(long[0]).state.params.items():
        assert torch.equal(best_of(folder).state.params[name], value)


def test_a_run_that_ends_earlier_than_it_was_killed_has_the_best_of_its_rounds(long, runs, monkeypatch):
    """The kill came when a later round's models were written already, and the run then gets fewer rounds."""
    folder, best = runs.folder / "run", long[1]["best"]["round"]
    before = begin(runs, "run", *LONG, f"federation.rounds={best - 1}") if best > 1 else None
    assert before is not None
    save_best = CheckpointStore._save_best

    def killed(self, *arguments):
        save_best(self, *arguments)
        raise RunFailed("killed")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "_save_best", killed)
        with pytest.raises(RunFailed):
            runs.local("run", *LONG)
    assert best_of(folder).round > before["best"]["round"]
    assert runs.local("run", *LONG, f"federation.rounds={best - 1}")[-1]["result"]["best"] == before["best"]
    assert best_of(folder).round == before["best"]["round"]


def test_the_first_of_equals_is_kept(runs):
    result = begin(runs, "run", "algorithm.name=fedavg", "local.lr=1e-9", "local.prompt_lr=1e-9", "data.limit=200")
    assert result["best"]["round"] == best_of(runs.folder / "run").round == 1


def test_only_scored_rounds_count(runs):
    result = begin(runs, "run", "algorithm.name=fedavg", "data.limit=200", "federation.eval_every=2")
    assert result["best"]["round"] == best_of(runs.folder / "run").round
    assert best_of(runs.folder / "run").round in (2, 3)


def test_it_lies_where_checkpoints_lie(runs):
    overrides = ("algorithm.name=fedavg", "data.limit=200", "runtime.storage=memory://best/run")
    result = begin(runs, "run", *overrides)
    store = CheckpointStore("memory://best/run")
    assert store.best().round == result["best"]["round"]
    assert store.latest().round == 3


@pytest.mark.parametrize("damage", ["lost", "cut off", "of another round"])
def test_a_best_model_that_is_lost_is_told(long, runs, damage):
    folder = shutil.copytree(long[0], runs.folder / "run")
    path = folder / "checkpoints" / "best.pt"
    if damage == "lost":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:500])
    else:
        shutil.copy(folder / "checkpoints" / "round_000006.pt", path)
    runs.local("run", *LONG, "federation.rounds=7")
    line = runs.lines("run")[-1]
    assert any("best.pt" in warning and "lost" in warning for warning in line["warnings"])
    result = json.loads((folder / "result.json").read_text())
    kept = best_of(folder) if damage != "cut off" else None
    assert result["best"] == long[1]["best"] or kept.round == result["best"]["round"] == 7
