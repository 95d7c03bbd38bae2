"""An address at which no cluster can be joined is one line, soon; the user's token goes to who demands one."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

ray = pytest.importorskip("ray")

import grpc  # noqa: E402

from fedprompt.errors import InputError, RunFailed  # noqa: E402
from fedprompt.runtime.ray import clusters  # noqa: E402


class Head(grpc.GenericRpcHandler):
    """What a cluster's head answers to who asks whether it is alive."""

    def __init__(self, token):
        self.token, self.seen = token, []

    def service(self, details):
        given = dict(details.invocation_metadata).get("authorization")
        self.seen.append(given)
        if details.method != clusters.ALIVE:
            return None

        def answer(request, context):
            if self.token and given != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def serving(handler):
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    """A user without token and settings, whose Ray is not really joined; gives how it would be."""
    for name in ("RAY_ADDRESS", clusters.MODE, clusters.TOKEN, clusters.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    joined = []
    monkeypatch.setattr(clusters, "_init", lambda address, **_: joined.append((address, os.environ["RAY_AUTH_MODE"])))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return joined


def refused(address):
    with pytest.raises(InputError) as error, clusters.connect(address, print):
        pass
    assert "\n" not in str(error.value)
    assert "allowed" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "garbage",
            "127.0.0.1",
            "127.0.0.1:",
            ":6379",
            "127.0.0.1:0",
            "127.0.0.1:99999",
            "127.0.0.1:x",
            "a b:1",
            "a\nb:1",
        ),
        *(
            "http://127.0.0.1:8265",
            "https://x",
            "foo://x:1",
            "127.0.0.1:６３７９",
            " ",
            "[::1",
            "::1:6379",
            "a/b:1",
            "1:2:3",
        ),
    ],
)
@pytest.mark.parametrize("key", ["runtime.address", "RAY_ADDRESS"])
def test_what_is_no_address_is_one_line_that_names_where_it_came_from(key, address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = refused(address if key == "runtime.address" else None)
    assert line.startswith(f"{key}: {address!r} is no address; allowed: HOST:PORT")


def test_a_ray_clients_address_is_refused_with_what_to_do_instead():
    assert "ray job submit" in refused("ray://127.0.0.1:10001")


def test_a_port_where_nobody_listens_or_something_else_answers_is_one_line(monkeypatch):
    monkeypatch.setattr(clusters, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        assert "no Ray cluster's head" in refused(f"127.0.0.1:{silent.getsockname()[1]}")
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            assert "nobody answers there" in refused(f"127.0.0.1:{unused.getsockname()[1]}")
    other = Head(None)
    other.service = lambda details: None
    with serving(other) as address:  # gRPC, but no cluster's head
        assert "no Ray cluster's head" in refused(address)


def test_auto_without_a_cluster_is_one_line(monkeypatch):
    monkeypatch.setattr(clusters.services, "canonicalize_bootstrap_address", lambda _: None)
    assert refused("auto").startswith("runtime.address: auto finds no running cluster")


def test_the_users_token_goes_to_a_cluster_that_demands_one_and_to_no_other(nothing_set, monkeypatch):
    monkeypatch.setenv(clusters.TOKEN, "secret")
    demanding, open_ = Head("secret"), Head(None)
    with serving(demanding) as address, clusters.connect(address, pytest.fail):
        assert nothing_set == [(address, "token")]
    assert demanding.seen == [None, "Bearer secret"]
    said = []
    with serving(open_) as address, clusters.connect(address, said.append):
        assert nothing_set[1:] == [(address, "disabled")]
    assert open_.seen == [None]
    assert said == [f"the cluster at {address} demands no token: whoever reaches its ports can run code there"]
    assert clusters.MODE not in os.environ


def test_a_token_in_a_file_that_others_read_is_closed_before_it_is_used(nothing_set, tmp_path):
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    with serving(Head("secret")) as address, clusters.connect(address, pytest.fail):
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("demands", "settings", "line"),
    [
        ("secret", {}, "demands a token and .*/.ray/auth_token gives none"),
        ("secret", {"RAY_AUTH_TOKEN": "wrong"}, "refuses the token"),
        ("secret", {"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, "RAY_AUTH_TOKEN_PATH: /no/such/file gives none"),
        ("secret", {"RAY_AUTH_TOKEN_PATH": "/dev/null"}, "RAY_AUTH_TOKEN_PATH: /dev/null gives none .it is empty"),
        ("secret", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"}, "RAY_AUTH_MODE: disabled, but"),
        (None, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, "RAY_AUTH_MODE: token, but .* demands none"),
        (None, {"RAY_AUTH_MODE": "tokn"}, "RAY_AUTH_MODE: 'tokn'; allowed: token, disabled"),
        (None, {"RAY_AUTH_MODE": ""}, "RAY_AUTH_MODE: ''; allowed: token, disabled"),
    ],
)
def test_a_cluster_and_settings_that_do_not_agree_are_one_line(demands, settings, line, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with serving(Head(demands)) as address, pytest.raises(InputError, match=line), clusters.connect(address, print):
        pass


def test_a_cluster_of_our_own_that_does_not_start_is_one_line_and_leaves_the_environment_as_it_was(monkeypatch):
    def too_slow(*_, **__):
        raise Exception("The current node timed out during startup.\nmore")  # what Ray raises

    monkeypatch.setattr(clusters, "_init", too_slow)
    before = dict(os.environ)
    with pytest.raises(RunFailed, match=r"Ray does not start on this machine .The current node timed out.* more"):
        clusters.connect(None, print).__enter__()
    assert dict(os.environ) == before


def test_a_cluster_of_our_own_that_was_too_slow_once_is_started_again(monkeypatch):
    tries = []

    def slow_once(*_, **__):
        tries.append(1)
        if len(tries) == 1:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(clusters, "_init", slow_once)
    monkeypatch.setattr(clusters, "_check_closed", lambda: None)
    with clusters.connect(None, print):
        assert len(tries) == 2
