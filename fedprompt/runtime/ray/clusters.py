"""Connecting to Ray: to the user's cluster at an address, or to a closed one of this machine's own.

Whoever reaches Ray's ports with its token, or without one where it demands none, can run code. A cluster of our own
therefore listens on loopback alone and demands a token that is drawn for it and that only its own processes know;
docs/cluster.md lists its ports. At an address the user's token is sent, and only to a cluster that demands one.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import secrets
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader, Config

from fedprompt import interrupts
from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime.ray.leftovers import marked, watched

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: one host, all of whose servers bind to loopback
ALLOWED = "HOST:PORT of a running cluster's head (6379 as a rule), auto, or none for one of this machine's own"
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # harmless, and answered by a cluster's head only
PATIENCE = 10  # seconds in which an address must answer
STARTS = 2  # of a cluster of our own: a machine that is busy for a while may be in time the second time
TOKENS = f"{TOKEN}, {TOKEN_PATH} or ~/.ray/auth_token"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker without a share of a GPU sees none
}


def connect(address: str | None, say: Callable[[str], None]) -> Any:
    """Return the context in which this process is connected: to ``address``, RAY_ADDRESS, or a cluster of its own.

    ``say`` is told where a cluster demands no token. Raises InputError where no cluster answers at the address or it
    refuses the token, RunFailed where Ray does not start.
    """
    key, address = ("runtime.address", address) if address else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"))
    return own_cluster() if address in (None, "", "local") else joined(key, address, say)


@contextmanager
def own_cluster(**options: Any) -> Iterator[None]:
    """Be connected to a new cluster of this machine's own, which ends with the context; ``options`` go to ``ray.init``.

    The user's RAY_AUTH_* do not count here: nobody else has anything to do with this cluster.
    """
    _checked_mode()
    closed = {
        MODE: "token",
        TOKEN: secrets.token_hex(32),
        ON_LOOPBACK: "0",
        "RAY_enable_metrics_collection": "0",  # otherwise an agent gives them to whoever asks
    }
    with watched(), _environment(closed), _one_host(), _shut_down():
        _start(include_dashboard=False, _node_ip_address="127.0.0.1", **options)
        _check_closed()
        yield


def _start(**options: Any) -> None:
    """Start Ray, once more where a busy machine let its half minute pass. Raises RunFailed where it does not start."""
    for attempt in range(1, STARTS + 1):
        try:
            _init("local", **options)
            return
        except Exception as error:  # Ray raises just that
            ray.shutdown()
            if attempt == STARTS:
                raise RunFailed(f"Ray does not start on this machine ({_one_line(error)})") from None


@contextmanager
def joined(key: str, address: str, say: Callable[[str], None]) -> Iterator[None]:
    """Be connected to the user's cluster at ``address``, which ``key`` gave."""
    mode = _checked_mode()
    with _environment({MODE: "disabled"}), _one_host():
        place = _place(key, address)
        demanded = _demands_token(key, address, place)
    if mode == "disabled" and demanded:
        raise InputError(f"{MODE}: disabled, but the cluster at {key}={address} demands a token; allowed: token")
    if mode == "token" and not demanded:
        raise InputError(f"{MODE}: token, but the cluster at {key}={address} demands none; allowed: one that does")
    if demanded:
        _check_token(key, address)
    else:
        say(f"the cluster at {address} demands no token: whoever reaches its ports can run code there")
    with _environment({MODE: "token" if demanded else "disabled"}):
        if demanded and _demands_token(key, address, place):
            raise InputError(f"{key}: the cluster at '{address}' refuses the token; allowed: its own, in {TOKENS}")
        with _shut_down():
            try:
                with _one_host():
                    _init(place)
            except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
                raise InputError(f"{key}: cannot join '{address}' ({_one_line(error)}); allowed: {ALLOWED}") from None
            yield


def _init(address: str, **options: Any) -> None:
    """Call ``ray.init``, whole; what workers print stays in Ray's log files."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with interrupts.deferred(), marked():  # a cluster that has half started would not end with us
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except SystemExit:  # Ray's own answer to SIGTERM meanwhile
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place


@contextmanager
def _shut_down() -> Iterator[None]:
    try:
        yield
    finally:
        with interrupts.deferred():
            ray.shutdown()


def _check_closed() -> None:
    """Raise RunFailed where a cluster of our own listens beyond loopback, as another Ray may make it."""
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    if not ipaddress.ip_address(head).is_loopback:
        raise RunFailed(
            f"ray {ray.__version__} listens at {head} although it was told 127.0.0.1; allowed: pip install ."
        )


def _place(key: str, address: str) -> str:
    """HOST:PORT of what the user calls ``auto`` or gives already. Raises InputError where it is neither."""
    if address == "auto":
        try:
            found = services.canonicalize_bootstrap_address("auto")
        except (OSError, ValueError):
            found = None
        if found is None:
            raise InputError(f"{key}: auto finds no running cluster on this machine; allowed: {ALLOWED}")
        return found
    if address.startswith("ray://"):
        raise InputError(
            f"{key}: '{address}' is a Ray Client's address, which holds neither a run's files nor its driver; "
            f"allowed: HOST:PORT from a host of the cluster, or from elsewhere: ray job submit"
        )
    host, _, port = address.rpartition(":")
    named = re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host, re.ASCII)
    if not named or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 0 < int(port) < 2**16:
        raise InputError(f"{key}: {address!r} is no address; allowed: {ALLOWED}")
    return address


def _demands_token(key: str, address: str, place: str) -> bool:
    """Whether the cluster refuses a request as this process sends it now; InputError where no cluster answers.

    Ray itself would go on asking for minutes, and would end the process where it is refused.
    """
    with init_grpc_channel(place, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=PATIENCE)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return True
            reason = "nobody answers there" if _silent(error) else "who answers there is no Ray cluster's head"
            raise InputError(f"{key}: no cluster at '{address}' ({reason}); allowed: {ALLOWED}") from None
    return False


def _silent(error: grpc.RpcError) -> bool:
    return error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in str(error.details()).lower()


def _checked_mode() -> str | None:
    mode = os.environ.get(MODE)
    if mode is not None and mode.lower() not in ("token", "disabled"):
        raise InputError(f"{MODE}: {mode!r}; allowed: token, disabled, or leave it unset")
    _close_default_token()
    return mode and mode.lower()


def _check_token(key: str, address: str) -> None:
    """Raise InputError where the user has no token that Ray could read: it would end the process."""
    if os.environ.get(TOKEN, "").strip():
        return
    given = os.environ.get(TOKEN_PATH)
    path = Path(given) if given else _default_token()
    try:
        empty = not path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no text"
    else:
        if not empty:
            return
        reason = "it is empty"
    found = f"{TOKEN_PATH}: {path}" if given else f"{key}: the cluster at '{address}' demands a token and {path}"
    raise InputError(f"{found} gives none ({reason}); allowed: the cluster's token, in {TOKENS}")


def _default_token() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _close_default_token() -> None:
    """Let only its owner read ~/.ray/auth_token, which Ray writes as the umask has it; InputError where that fails."""
    path = _default_token()
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            path.chmod(0o600)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: others can read this token ({error.strerror}); allowed: mode 0600") from None


@contextmanager
def _one_host() -> Iterator[None]:
    """Have Ray take 127.0.0.1 at its word instead of asking for the host's outside address.

    Processes that it starts learn that from ON_LOOPBACK; this one has read it already.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change the environment of this process and of those that it starts, and back; Ray reads it again each time."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _read_again()


def _read_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
