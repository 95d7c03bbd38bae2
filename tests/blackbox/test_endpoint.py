"""The black box against strangers: who may ask what, what is counted, and what a hostile request comes to."""

import asyncio
import json
import random

import numpy as np
import pytest

pytest.importorskip("starlette", reason="no web server is installed: pip install 'fedprompt[serve]'")

from fedprompt.blackbox import endpoint, runs
from fedprompt.blackbox.batching import Batcher, Desk
from fedprompt.blackbox.endpoint import Door, Endpoint
from fedprompt.blackbox.npy import from_npy, to_npy
from fedprompt.blackbox.runs import Limits, Runs

SIZE, CLASSES, TOKEN = 4, 5, "a-token-of-these-tests"
SCORES = "/run/0/scores?request=1.0"
ABOUT = {"bytes": 100, "classes": CLASSES, "image_size": SIZE, "clients": 3}


def score(images):
    assert np.isfinite(images).all()
    return np.tile(images.mean((1, 2, 3))[:, None], CLASSES)


def service(budget=30, known=1, demanded=False):
    """A service for three clients, whose evaluation may ask 50 queries."""
    limits = Limits(clients=3, budget=budget, evaluation=50, runs=known)
    return Endpoint(ABOUT, Runs(limits), Desk(Batcher(score)), Door(TOKEN, demanded))


def images(n=10, seed=0):
    return np.random.default_rng([n, seed]).random((n, 3, SIZE, SIZE), dtype=np.float32)


def ask(app, target, body=None, method=None, chunks=None, **headers):
    """The status and the body of one request's answer; ``headers`` with _ for -."""
    path, _, query = target.partition("?")
    chunks = [body or b""] if chunks is None else chunks
    given = {"host": "localhost", **({} if body is None else {"content_length": str(len(body))}), **headers}
    scope = {
        "type": "http",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items() if value],
    }
    waiting = ({"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks)
    sent = []

    async def receive():
        return next(waiting, {"type": "http.request", "body": b"", "more_body": False})

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def counts(app, run="run", **headers):
    return {int(client): count for client, count in json.loads(ask(app, f"/{run}/counts", **headers)[1]).items()}


def answered(app, targets, **headers):
    """How many images of requests with ever new ones are answered."""
    return sum(
        10 * (ask(app, target, to_npy(images(10, number)), **headers)[0] == 200)
        for number, target in enumerate(targets)
    )


def test_images_are_answered_with_scores_and_counted():
    app = service()
    status, body = ask(app, SCORES, to_npy(images()))
    assert status == 200
    np.testing.assert_allclose(from_npy(body), score(images()), rtol=1e-6)
    assert counts(app) == {0: 10}
    assert json.loads(ask(app, "/about")[1]) == ABOUT


# --- budgets


@pytest.mark.parametrize(
    "targets",
    {
        "one number again and again": ["/run/0/scores?request=1.0"] * 18,
        "ever new numbers": [f"/run/0/scores?request={number}" for number in range(18)],
        "ever new runs": [f"/run{number // 6}/0/scores?request=1" for number in range(18)],
        "numbers that are written otherwise": [f"/run/0/scores?request={'0' * zeros}1" for zeros in range(9)],
    }.items(),
    ids=lambda case: case[0],
)
def test_a_budget_ends_whatever_a_request_is_called(targets):
    assert answered(service(), targets[1]) == 30


def test_there_are_no_clients_beside_the_federations_own():
    app = service()
    assert answered(app, [f"/run/{client}/scores?request=1" for client in (3, 4, 29, 999_999_999)]) == 0
    assert answered(app, [f"/run/{client}/scores?request=1" for client in ("-2", "01", "1e0", "9" * 30)]) == 0
    assert counts(app) == {}


def test_evaluation_needs_the_token_and_has_an_end():
    app, targets = service(), [f"/run/-1/scores?request={number}" for number in range(18)]
    assert answered(app, targets) == 0
    assert answered(app, targets, authorization=f"Bearer {TOKEN}") == 50
    assert counts(app) == {-1: 50}
    assert answered(service(budget=None), targets) == 180  # where nobody has a budget, there is nothing to evade


def test_a_repeated_request_is_answered_alike_and_counted_once_even_at_the_end_of_the_budget():
    app, body = service(), to_npy(images(30))
    assert len({ask(app, SCORES, body) for _ in range(5)}) == 1
    assert ask(app, SCORES, to_npy(images(1)))[0] == 429
    assert ask(app, SCORES, body)[0] == 200
    assert counts(app) == {0: 30}


def test_as_many_runs_as_the_service_is_told_and_no_more():
    app = service(known=2)
    assert answered(app, [f"/run{number}/0/scores?request=1" for number in (0, 1, 2, 3, 0, 1)]) == 40
    status, line = ask(app, "/run7/0/scores?request=1", to_npy(images()))
    assert status == 403
    assert b"--runs N" in line


def test_without_a_budget_the_run_that_was_silent_longest_makes_room(monkeypatch):
    monkeypatch.setattr(runs, "WITHOUT_BUDGET", 2)
    app = service(budget=None)
    assert answered(app, [f"/{run}/0/scores?request=1" for run in ("a", "b", "a", "c")]) == 40
    assert [counts(app, run) for run in ("a", "b", "c")] == [{0: 20}, {}, {0: 10}]


def test_nobody_becomes_known_by_a_question_that_is_refused():
    app = service()
    for target in ("/other/counts", "/other/0/scores?request=x", "/other/9/scores?request=1", "/other/0/scores"):
        ask(app, target, None if "counts" in target else to_npy(images()))
    ask(app, "/other/0/scores?request=1", b"rubbish")
    assert answered(app, [SCORES]) == 10


def test_what_a_resumed_run_has_asked_before_can_only_raise_its_counts():
    app = service()
    assert ask(app, "/run/resume", json.dumps({"0": 25, "1": 3}).encode())[0] == 204
    assert answered(app, [SCORES]) == 0
    assert ask(app, "/run/resume", json.dumps({"0": 1}).encode())[0] == 204
    assert counts(app) == {0: 25, 1: 3}
    for bad in (b"", b"[]", b"[" * 100_000, b'{"0": -1}', b'{"0": 1.5}', b'{"0": true}', b'{"x": 1}', b'{"0": 1e999}'):
        assert ask(app, "/run/resume", bad)[0] == 400
    assert ask(app, "/run/resume", b'{"7": 1}')[0] == 403
    assert counts(app) == {0: 25, 1: 3}


# --- who may ask


@pytest.mark.parametrize("path", ["/about", "/run/counts", "/nowhere", "/run/resume", SCORES])
@pytest.mark.parametrize(
    "said", ["", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "é"]
)
def test_where_a_token_is_demanded_nothing_is_answered_without_it(path, said):
    app, body = service(demanded=True), to_npy(images()) if path.endswith(("resume", "1.0")) else None
    assert ask(app, path, body, authorization=said)[0] == 401
    assert ask(app, path, body, authorization=f"Bearer {TOKEN}")[0] != 401


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}])
def test_a_page_in_a_browser_is_refused_where_no_token_is_demanded(headers):
    app = service()
    assert ask(app, SCORES, to_npy(images()), **headers)[0] == 403
    assert counts(app) == {}
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", ""):
        assert ask(app, "/about", host=host)[0] == 200


# --- bad requests


QUERIES = (
    "",
    "?",
    "?request=",
    "?request=x",
    "?request=-1",
    "?request=1e3",
    "?request=1..2",
    "?request=.",
    "?request=1.",
)
MORE = ("?request=1&request=1", "?request=1&more=2", "?Request=1", "?request=%D9%A1", "?request=%00", "?request=+1")
HUGE = (f"?request={'9' * 5000}", f"?request={'1.' * 50}1", "?request=" + "x" * 5000)


@pytest.mark.parametrize("query", [*QUERIES, *MORE, *HUGE])
def test_a_number_that_is_none_is_400(query):
    app = service()
    status, line = ask(app, "/run/0/scores" + query, to_npy(images()))
    assert (status, b"\n" in line, len(line) < 250) == (400, False, True)
    assert counts(app) == {}


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 1e30, 255, 1.001, -0.001, -1], ids=lambda value: f"pixels of {value}"
)
def test_one_pixel_that_is_no_number_from_0_to_1_is_400_and_not_counted(value):
    app, wrong = service(), images()
    wrong[7, 1, 2, 3] = value
    status, line = ask(app, SCORES, to_npy(wrong))
    assert status == 400
    assert b"0 (black) to 1 (white)" in line
    assert counts(app) == {}


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 1, 4, 4), (1, 3, 4, 5), (3, 4, 4), (), (1, 1, 3, 4, 4)])
def test_images_of_another_shape_are_400(shape):
    status, line = ask(service(), SCORES, to_npy(np.zeros(shape, np.float32)))
    assert status == 400
    assert b"allowed: float32 [n, 3, 4, 4], n from 1" in line


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        *((method, SCORES, 405) for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW", "X" * 1000)),
        *((method, "/about", 405) for method in ("POST", "PATCH")),
        *(
            ("GET", path, 404)
            for path in ("/", "//about", "/about/", "/../about", "/run\n/counts", "/é/counts", "/a b")
        ),
        *(("GET", path, 404) for path in (f"/{'a' * 65}/counts", "/run/0/counts", "/" + "/" * 5000)),
        *(("POST", path, 404) for path in ("/run/x/scores", "/run/1.0/scores", "/run/-0/scores", "/run/scores")),
        ("GET", "/about?x=1", 400),
    ],
)
def test_other_methods_and_paths_are_told_what_there_is(method, target, status):
    found, line = ask(service(), target, method=method)
    assert found == status
    assert b"\n" not in line
    assert len(line) < 250


def test_a_body_is_not_taken_in_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST", 1000)
    app, taken = service(), []

    def chunks(count):
        for number in range(count):
            taken.append(number)
            yield b"x" * 100

    assert ask(app, SCORES, b"", content_length="1001", chunks=chunks(20))[0] == 413
    assert taken == []
    assert ask(app, SCORES, b"", content_length="", transfer_encoding="chunked", chunks=chunks(10**9))[0] == 413
    assert len(taken) == 11
    for length in ("-1", "x", "1e3", "9" * 30):
        assert ask(app, SCORES, b"", content_length=length)[0] == 400


def test_all_bodies_together_have_a_limit_and_are_let_go(monkeypatch):
    body = to_npy(images(1))
    monkeypatch.setattr(endpoint, "HELD", len(body))
    app = service()
    assert ask(app, SCORES, to_npy(images(2)))[0] == 503
    assert ask(app, SCORES, b"rubbish")[0] == 400
    assert ask(app, SCORES, body)[0] == 200


def test_whatever_comes_is_refused_in_one_line_or_answered_and_counted():
    rng, app, answers = random.Random(0), service(budget=None), 0
    parts = [
        "/run",
        "/-1",
        "/0",
        "/7",
        "/scores",
        "/counts",
        "/about",
        "/resume",
        "/",
        "%",
        "\0",
        "é",
        "?request=1",
        "?",
        "&",
    ]
    bodies = [to_npy(images(1)), to_npy(images(2)), b"", b"{}", b"PK\x03\x04", None]
    for _ in range(600):
        target = SCORES if rng.random() < 0.5 else "".join(rng.choices(parts, k=rng.randint(1, 6)))
        body = rng.choice(bodies)
        if body and rng.random() < 0.7:
            body = bytearray(body)
            for _ in range(rng.randint(1, 3)):
                body[rng.randrange(min(len(body), 300))] = rng.randrange(256)
            body = bytes(body)
        status, said = ask(app, target, body, rng.choice(["GET", "POST", "PUT", None]))
        assert status in (200, 204, 400, 403, 404, 405), (status, target, said)
        assert status in (200, 204) or b"\n" not in said
        answers += status == 200 and said.startswith(b"\x93NUMPY")
    assert answers
    assert counts(app)[0] > 0
