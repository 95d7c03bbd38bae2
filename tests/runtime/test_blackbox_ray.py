"""The black box as a Ray actor and over HTTP: the same numbers, and nothing of the model in a worker."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from test_ray import accuracies, processes_of  # noqa: E402

from fedprompt.blackbox.http import HttpService, to_npy  # noqa: E402
from fedprompt.errors import InputError, OutOfBudget  # noqa: E402
from fedprompt.runtime.build import build_algorithm, build_data  # noqa: E402
from fedprompt.runtime.pool import public_split, service_here  # noqa: E402
from fedprompt.runtime.ray.on_ray import run_on_ray  # noqa: E402
from fedprompt.runtime.ray.places import reserved  # noqa: E402
from fedprompt.runtime.ray.pool import RayPool  # noqa: E402
from fedprompt.runtime.ray.service import start_service  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("small_cluster")]
BLACK = "algorithm.name=fedbbpt"
TWO = ("runtime.workers=2", "runtime.cpus_per_worker=0.5")


@pytest.fixture(scope="module")
def local(shared_runs):
    """Records of the run in this process that others are compared with."""
    return shared_runs.local("local", BLACK)


def on_ray(runs, name, *overrides):
    return run_on_ray(runs.config(BLACK, *TWO, *overrides), runs.folder / name)


def assert_same_run(runs, name, records, local):
    assert accuracies(records) == pytest.approx(accuracies(local), abs=5e-3)
    expected, found = runs.params("local"), runs.params(name)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=1e-3)
    assert [r["queries"] for r in records if "queries" in r] == [r["queries"] for r in local if "queries" in r]
    assert records[-1]["result"]["queries"] == local[-1]["result"]["queries"]


def test_on_ray_the_run_is_the_one_in_one_process(shared_runs, local):
    assert_same_run(shared_runs, "two", list(on_ray(shared_runs, "two")), local)


@pytest.mark.parametrize("victim", ["Worker", "ServiceActor"])
def test_whoever_dies_the_numbers_stay_the_same(shared_runs, local, victim):
    killed, records = [], {}
    for record in on_ray(shared_runs, victim):
        if record.get("round") == 1 and not killed:
            killed = processes_of(victim)
            os.kill(killed[0], signal.SIGKILL)
        if "round" in record:
            records[record["round"]] = record
    assert killed
    assert_same_run(shared_runs, victim, [*records.values(), record], local)


def test_a_worker_on_ray_has_neither_timm_nor_a_backbone(shared_runs):
    config = shared_runs.config(BLACK, *TWO)
    data, algorithm = build_data(config), build_algorithm(config)
    with reserved(config) as places:
        pool = RayPool(config, data, places)
        try:
            state = algorithm.init(pool.facts.params, np.random.default_rng(0))
            groups = [[algorithm.task(state, client, 1)] for client in range(4)]
            updates = [update for done in pool.train(1, groups) for update in done]
            pool.predict("validation", updates[0].params)
            for worker in pool.workers:
                imported = worker.__ray_call__.remote(lambda _: set(__import__("sys").modules))  # there, not here
                made = worker.__ray_call__.remote(lambda self: set(vars(self)))
                assert "fedprompt.client.rules.zeroth_order" in ray.get(imported)
                assert "timm" not in ray.get(imported)
                assert "_model" not in ray.get(made)
            assert {update.client for update in updates} == {0, 1, 2, 3}
        finally:
            pool.close()


def test_many_callers_of_the_actor_get_their_own_answers_and_exactly_the_budget(shared_runs):
    config = shared_runs.config(BLACK, *TWO, "blackbox.budget=40")
    data = build_data(config)
    alone = service_here(config, data)
    with reserved(config) as places:
        service = start_service(config, 10, public_split(data), places, threads=1)
        images = np.random.default_rng(0).random((30, 2, 3, 32, 32), dtype=np.float32)

        def ask(number):
            try:
                return service.scores(5, images[number], (1, number))
            except OutOfBudget as refusal:
                return str(refusal)

        with ThreadPoolExecutor(10) as threads:
            answers = list(threads.map(ask, range(30)))
        refused = [answer for answer in answers if isinstance(answer, str)]
        assert len(refused) == 10
        assert all("client 5 has asked 40 of its 40 queries" in line for line in refused)
        assert service.counts() == {5: 40}
        for number, answer in enumerate(answers):
            if not isinstance(answer, str):
                np.testing.assert_allclose(answer, alone.scores(-1, images[number], (0, number)), atol=1e-4)
        service.close()


# --- over HTTP


@pytest.fixture(scope="module")
def address(shared_runs):
    """A service in processes of its own, with a budget of 2000 queries for each client of a run."""
    pytest.importorskip("uvicorn", reason="no web server is installed: pip install 'fedprompt[serve]'")
    command = [*shared_runs.command("x", BLACK, "blackbox.budget=2000")[:-2], "--port", "18765", "--runs", "4"]
    command[command.index("run")] = "serve"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("serving at http://127.0.0.1:18765"), process.stderr.read()
    yield "http://127.0.0.1:18765"
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_over_http_the_run_is_the_one_in_one_process(shared_runs, local, address):
    records = shared_runs.local("over", BLACK, f"blackbox.address={address}")
    assert_same_run(shared_runs, "over", records, local)


def test_over_http_a_repeated_request_counts_once_and_the_budget_is_kept(address):
    service, images = HttpService(address, "test"), np.random.default_rng(0).random((900, 3, 32, 32), dtype=np.float32)
    first, again = (service.scores(3, images, (1, 0)) for _ in range(2))
    np.testing.assert_allclose(first, again, atol=1e-5)
    service.scores(3, images, (1, 1))
    assert service.counts() == {3: 1800}
    with pytest.raises(OutOfBudget, match="client 3 has asked 1,800 of its 2,000 queries; 900 more are refused"):
        service.scores(3, images, (1, 2))
    assert HttpService(address, "other").counts() == {}


def test_bad_requests_over_http_are_told_in_one_line(address):
    service = HttpService(address, "test")
    with pytest.raises(InputError, match=r"float32 \(2, 3, 8, 8\); allowed: float32 \[n, 3, 32, 32\]"):
        service.scores(4, np.zeros((2, 3, 8, 8)), (1, 0))
    for path, body, code in (
        ("a/1/scores?request=1", b"rubbish", 400),
        ("a/1/scores?request=x", to_npy(np.zeros((1, 3, 32, 32), np.float32)), 400),
        ("a/1/scores", to_npy(np.zeros((1, 3, 32, 32), np.float32)), 400),
        ("a/b/c", None, 404),
    ):
        with pytest.raises(HTTPError) as error:
            urlopen(f"{address}/{path}", body)
        assert error.value.code == code
        assert error.value.read().count(b"\n") == 0
    with pytest.raises(InputError, match=r"backbone\.image_size: image_size is 28 here and 32"):
        service.check(10, 28, 6)


def test_without_a_web_server_the_command_says_what_to_install(monkeypatch, capsys):
    from fedprompt.cli import main

    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.requests", None)
    for package, module in (("fedprompt.blackbox", "endpoint"), ("fedprompt.runtime.serving", "http_service")):
        monkeypatch.delitem(sys.modules, f"{package}.{module}", raising=False)  # else it is not imported again
        monkeypatch.delattr(sys.modules[package], module, raising=False)
    with pytest.raises(SystemExit) as end:
        main.main(["serve", BLACK])
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.count("\n") == 1
    assert "pip install 'fedprompt[serve]'" in line
