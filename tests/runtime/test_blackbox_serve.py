"""`fedprompt serve` from outside: its port, its token, and connections that are slow, many or malformed."""

import os
import signal
import socket
import stat
import threading
from contextlib import contextmanager

import numpy as np
import pytest

uvicorn = pytest.importorskip("uvicorn", reason="no web server is installed: pip install 'fedprompt[serve]'")

from fedprompt.blackbox import http as client  # noqa: E402
from fedprompt.blackbox.access import VARIABLE, check_address, given_token, left_for_this_user, token_for  # noqa: E402
from fedprompt.blackbox.batching import Batcher, Desk  # noqa: E402
from fedprompt.blackbox.endpoint import Endpoint  # noqa: E402
from fedprompt.blackbox.http import HttpService  # noqa: E402
from fedprompt.blackbox.npy import to_npy  # noqa: E402
from fedprompt.blackbox.runs import Limits, Runs  # noqa: E402
from fedprompt.cli import main  # noqa: E402
from fedprompt.config.parsing import load  # noqa: E402
from fedprompt.errors import InputError, OutOfBudget  # noqa: E402
from fedprompt.runtime.build import build_data  # noqa: E402
from fedprompt.runtime.serving import connections, http_service  # noqa: E402

TOKEN = "a-token-of-these-tests"
ABOUT = {"bytes": 100, "classes": 5, "image_size": 4, "clients": 3}
IMAGES = np.random.default_rng(0).random((10, 3, 4, 4), dtype=np.float32)


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    """No token of the user's own is read or written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)


def cheap(door):
    """A model that costs nothing, for one run of three clients with a budget of 30."""
    limits = Limits(clients=3, budget=30, evaluation=50, runs=1)
    desk = Desk(Batcher(lambda images: np.tile(images.mean((1, 2, 3))[:, None], 5)))
    return Endpoint(ABOUT, Runs(limits), desk, door)


@contextmanager
def served(endpoint=cheap, number=0):
    """A service in a thread; yields its port."""
    port = http_service.opened("127.0.0.1", number)
    server = http_service.Server(endpoint(port.door), lambda: None)
    thread = threading.Thread(target=server.run, args=([port.socket],))
    thread.start()
    try:
        with left_for_this_user(port.door.token, port.number):
            yield port
    finally:
        server.should_exit = True
        thread.join()


def exchanged(port, *parts, close=True):
    """What comes back for raw bytes until the other end closes."""
    with socket.create_connection(("127.0.0.1", port.number), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


# --- the port


def command(*arguments):
    with pytest.raises(SystemExit) as end:
        main.main(["serve", "algorithm.name=fedbbpt", *arguments])
    return end.value.code


def test_a_port_in_use_is_told_in_one_line_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(
        http_service, "build_data", lambda _: pytest.fail("loads data for a port that is not to be had")
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert command("--port", str(port)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"--port: {port} on 127.0.0.1 is in use; allowed: another port" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *((("--port", port), "0<=x<=65535") for port in ("-1", "65536", "99999999999999999999")),
        (("--port", "http"), "'http' is not a valid integer"),
        (("--host", "192.0.2.1"), "--host: cannot listen on '192.0.2.1'"),
        (("--host", "no such\nhost"), "--host: 'no such\\nhost' is no address"),
        (("--host", "a" * 300), "is no address"),
        (("--host", "x..y"), "is no address"),
        (("--runs", "0"), "--runs"),
    ],
)
def test_a_host_or_port_that_cannot_be_had_is_told_in_one_line(capsys, arguments, named):
    assert command(*arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert named in line


def test_a_port_that_this_user_may_not_have_is_told_in_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert command("--port", "80") == 2
    assert "--port: 80 on 127.0.0.1 may not be used by this user; allowed" in capsys.readouterr().err


def test_port_0_is_a_free_one_that_is_told():
    first, second = http_service.opened("127.0.0.1", 0), http_service.opened("localhost", 0)
    assert first.address == f"http://127.0.0.1:{first.number}"
    assert second.address == f"http://localhost:{second.number}"
    assert 0 not in (first.number, second.number)
    first.socket.close()
    second.socket.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_without_a_word(runs, start_process, tmp_path, number):
    command = runs.command("x", "algorithm.name=fedbbpt", "blackbox.budget=9")[:-2]
    process = start_process([*("serve" if word == "run" else word for word in command), "--port", "0"])
    assert process.stdout.readline().startswith("serving at http://127.0.0.1:")
    assert process.stdout.readline().startswith(
        "evaluation by another user than this one needs the token: export FEDPR"
    )
    process.send_signal(number)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 0
    assert not list((tmp_path / ".fedprompt").iterdir())


# --- the token


@pytest.mark.parametrize(("host", "demanded"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_a_token_is_demanded_beyond_loopback_and_where_one_is_given(monkeypatch, host, demanded):
    port = http_service.opened(host, 0)
    port.socket.close()
    assert port.door.demanded == demanded
    assert len(port.door.token) > 30
    monkeypatch.setenv(VARIABLE, TOKEN)
    port = http_service.opened(host, 0)
    port.socket.close()
    assert (port.door.token, port.door.demanded) == (TOKEN, True)


def test_every_service_has_a_token_of_its_own_that_only_its_user_can_read(tmp_path):
    with left_for_this_user("first-of-all-tokens", 1), left_for_this_user("second-of-all-tokens", 2):
        files = list((tmp_path / ".fedprompt").iterdir())
        assert {stat.S_IMODE(os.stat(path).st_mode) for path in files} == {0o600}
        assert stat.S_IMODE(os.stat(tmp_path / ".fedprompt").st_mode) == 0o700
        assert token_for("http://127.0.0.1:2") == "second-of-all-tokens"
        assert token_for("http://localhost:1/") == "first-of-all-tokens"
        assert token_for("http://192.0.2.1:1") is None  # nobody else is sent it
    assert not list((tmp_path / ".fedprompt").iterdir())


@pytest.mark.parametrize(
    "token", ["short", "with spaces in the middle", "line\nbreaks-in-the-token", "é" * 20, "x" * 300]
)
def test_a_token_that_is_none_is_refused_without_showing_it(monkeypatch, token):
    monkeypatch.setenv(VARIABLE, token)
    with pytest.raises(InputError, match="16 to 256 of") as error:
        given_token()
    assert token not in str(error.value)


def test_a_client_with_the_token_is_answered_and_one_without_is_told_where_it_belongs(monkeypatch):
    monkeypatch.setenv(VARIABLE, TOKEN)
    with served() as port:
        service = HttpService(port.address, "run")
        service.check(5, 4, 3)
        assert service.scores(0, IMAGES, (1, 0)).shape == (10, 5)
        monkeypatch.setenv(VARIABLE, TOKEN + "x")
        with pytest.raises(
            InputError, match=rf"{VARIABLE}: not the token of {port.address}.*`fedprompt serve` printed"
        ):
            HttpService(port.address, "run").check(5, 4, 3)


def test_the_user_of_a_service_on_loopback_evaluates_without_being_told_a_token(monkeypatch, tmp_path):
    with served() as port:
        assert HttpService(port.address, "run").scores(-1, IMAGES, (0, 0)).shape == (10, 5)
        monkeypatch.setenv("HOME", str(tmp_path / "of another user"))
        stranger = HttpService(port.address, "run")
        with pytest.raises(InputError, match=f"{VARIABLE}: no token of"):
            stranger.scores(-1, IMAGES, (1, 0))
        assert stranger.scores(0, IMAGES, (1, 0)).shape == (10, 5)


# --- a client


def test_a_client_knows_what_a_service_refuses():
    with served() as port:
        service = HttpService(port.address, "run")
        service.resume({0: 25})
        with pytest.raises(OutOfBudget, match="client 0 has asked 25 of its 30 queries; 10 more are refused"):
            service.scores(0, IMAGES, (1, 0))
        with pytest.raises(InputError, match="client 3: not in the federation that is served; allowed: 0 to 2"):
            service.scores(3, IMAGES, (1, 0))
        with pytest.raises(InputError, match=r"federation\.clients: 9 here and 3 at"):
            service.check(5, 4, 9)
        with pytest.raises(InputError, match="run second: one more than the 1"):
            HttpService(port.address, "second").check(5, 4, 3)
        assert np.isnan(service.scores(1, np.full_like(IMAGES, np.nan), (1, 0))).all()
        assert service.counts() == {0: 25}


BAD_ADDRESSES = ["", "x", "127.0.0.1:8000", "file:///etc/passwd", "ftp://host", "http://", "http://:80", "http://a:x"]
MORE_THAN_ADDRESSES = ["http://user:secret@host", "http://host?token=secret", "http://host#secret"]


@pytest.mark.parametrize("address", [*BAD_ADDRESSES, "http://a b", "http://a\nb", "http://[::1", "http://a:99999"])
def test_an_address_that_is_none_is_told_in_one_line(address):
    with pytest.raises(InputError, match=r"^blackbox\.address: .* is no address; allowed: http://HOST:PORT") as error:
        check_address(address)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", MORE_THAN_ADDRESSES)
def test_a_secret_in_an_address_is_refused_before_it_is_written_anywhere(address):
    with pytest.raises(InputError, match=VARIABLE) as error:
        load(None, ["algorithm.name=fedbbpt", f"blackbox.address={address}"])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("said", [b"", b"[1]", b"{}", b"[" * 5000, b'{"bytes": "x"}', b"\xff"])
def test_another_service_at_the_address_is_told_in_one_line(monkeypatch, said):
    monkeypatch.setattr(HttpService, "_ask", lambda *_: said)
    with pytest.raises(InputError, match=r"blackbox\.address: no service at .*is no service of `fedprompt serve`"):
        HttpService("http://127.0.0.1:9", "run").check(5, 4, 3)
    with pytest.raises(OSError, match="is no service of"):
        HttpService("http://127.0.0.1:9", "run").scores(0, IMAGES, (1, 0))


def test_what_a_run_may_score_follows_from_its_rounds(runs):
    config = runs.config("algorithm.name=fedbbpt", "federation.rounds=3")
    data = build_data(config)
    alike = len(data.test) + len(data.validation)
    assert http_service.limits_of(config, data, 1).evaluation == 2 * 5 * alike
    config = runs.config("algorithm.name=local", "prompt.kind=visual", "local.optimizer=spsa", "federation.rounds=3")
    assert http_service.limits_of(config, data, 1).evaluation > 2 * 5 * 6 * len(data.validation)


def test_a_run_that_goes_on_asks_a_restarted_service_no_more_than_its_budget(runs):
    black = ("algorithm.name=fedbbpt", "blackbox.budget=100")

    def tiny(door):
        return http_service.endpoint(runs.config(*black), 1, door)

    def queries(name):
        return [line["queries"] for line in runs.lines(name)]

    runs.local("whole", *black)
    with served(tiny) as port:
        address = f"blackbox.address={port.address}"
        runs.local("parts", black[0], address, "federation.rounds=1")
        (runs.folder / "parts" / "result.json").unlink()
    with served(tiny, port.number):  # which knows nothing of what was asked before
        runs.local("parts", black[0], address)
    assert queries("parts") == queries("whole")
    assert any(line["out_of_budget"] for line in runs.lines("whole")[1:])


# --- connections


REQUEST = b"POST /run/0/scores?request=1 HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((b"GET /about HT",), b"408"),
        ((b"", b""), b"408"),
        ((REQUEST,), b"408"),
        ((REQUEST + b"Content-Length: 1000\r\n\r\n", b"x"), b"408"),
        ((REQUEST + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nabc"), b"408"),
        ((REQUEST + b"Content-Length: 999999999\r\n\r\n", b"x"), b"413"),
    ],
    ids=["a line", "nothing", "headers", "a body", "chunks", "a body that is refused"],
)
def test_who_never_comes_to_an_end_is_cut_off(monkeypatch, parts, status):
    monkeypatch.setattr(connections, "HEADERS", 0.2)
    monkeypatch.setattr(connections, "BODY", 0.2)
    with served() as port:
        answer = exchanged(port, *parts, close=False)
        assert answer.split(b" ")[1] == status
        assert HttpService(port.address, "run").counts() == {}


def test_a_byte_now_and_then_does_not_keep_a_connection_open(monkeypatch):
    monkeypatch.setattr(connections, "HEADERS", 0.5)
    with served() as port, socket.create_connection(("127.0.0.1", port.number), timeout=0.05) as connection:
        connection.sendall(b"GET /about HTTP/1.1\r\nX: ")
        answer = b""
        while not answer:
            connection.sendall(b"y")
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                continue
        assert answer.split(b" ")[1] == b"408"


def test_there_are_no_more_connections_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 3)
    with served() as port:
        idle = [socket.create_connection(("127.0.0.1", port.number)) for _ in range(3)]
        assert exchanged(port, close=False).split(b" ")[1] == b"503"
        for connection in idle:
            connection.close()
        monkeypatch.setattr(client, "PAUSES", (0.1,) * 50)
        assert HttpService(port.address, "run").scores(0, IMAGES, (1, 0)).shape == (10, 5)


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\r\n\r\n",
    "no version": b"GET /about\r\n\r\n",
    "another version": b"GET /about HTTP/x\r\n\r\n",
    "no host": b"GET /about HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /about HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a long header": b"GET /about HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000,
    "a negative length": REQUEST + b"Content-Length: -5\r\n\r\n",
    "a length that is none": REQUEST + b"Content-Length: five\r\n\r\n",
    "two lengths": REQUEST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "a chunk that is none": REQUEST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "another encoding": REQUEST + b"Transfer-Encoding: gzip\r\n\r\n",
    "no name of a header": b"GET /about HTTP/1.1\r\n: x\r\n\r\n",
    "a folded header": b"GET /about HTTP/1.1\r\nHost: localhost\r\n\tb: c\r\n\r\n",
}


def test_malformed_requests_are_400_and_leave_the_service_as_it_was(capfd):
    with served() as port:
        for name, data in MALFORMED.items():
            answer = exchanged(port, data, close=False)
            head, _, line = answer.partition(b"\r\n\r\n")
            assert head.split(b" ")[1] in (b"400", b"403", b"501"), name
            assert b"Invalid HTTP request received." in line or b"\n" not in line, name
        # what comes behind an answer, or in its place, is no reason for a word on the operator's terminal
        exchanged(port, b"GET /about HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3 + b"\0\0\r\n\r\n", close=False)
        exchanged(port, REQUEST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", b"zz\r\n", close=False)
        assert HttpService(port.address, "run").scores(0, IMAGES, (1, 0)).shape == (10, 5)
        assert HttpService(port.address, "run").counts() == {0: 10}
    assert capfd.readouterr().err == ""


def test_a_client_that_goes_away_does_not_disturb(capfd):
    with served() as port:
        body = to_npy(IMAGES)
        for sent in (REQUEST[:30], REQUEST + b"Content-Length: %d\r\n\r\n" % len(body) + body[:-1]):
            with socket.create_connection(("127.0.0.1", port.number)) as connection:
                connection.sendall(sent)
        assert HttpService(port.address, "run").scores(1, IMAGES, (1, 0)).shape == (10, 5)
        assert HttpService(port.address, "run").counts() == {1: 10}
    assert capfd.readouterr().err == ""
