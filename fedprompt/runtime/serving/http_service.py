"""The black box as a web server (the extra ``serve``); its paths: ``blackbox/http.py``.

It listens on loopback unless it is told otherwise, computes in this process, and opens no port but the one it prints.
"""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fedprompt.blackbox.access import VARIABLE, given_token, left_for_this_user, new_token
from fedprompt.blackbox.batching import Batcher, Desk
from fedprompt.blackbox.runs import Limits, Runs
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data, build_scorer, build_served
from fedprompt.runtime.pool import public_split
from fedprompt.runtime.scoring import images_scored

try:
    import uvicorn

    from fedprompt.blackbox.endpoint import Door, Endpoint
    from fedprompt.runtime.serving.connections import LimitedConnection
except ImportError as error:
    raise InputError(f"serve: needs a web server ({error}); allowed: pip install 'fedprompt[serve]'") from None

LAST_ANSWERS = 5  # seconds that requests under way have to end when the server does
TAKEN = {errno.EADDRINUSE: "is in use", errno.EACCES: "may not be used by this user"}


@dataclass(frozen=True)
class Port:
    """An open port: its socket, its number, the address to ask, who is let in, and whether the user gave the token."""

    socket: socket.socket
    number: int
    address: str
    door: Door
    given: bool


def opened(host: str, port: int) -> Port:
    """Open the port, so that nothing is computed for a service that nobody can reach.

    Nobody is answered before ``serve``. Raises InputError where the port or the host cannot be had.
    """
    token = given_token()
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host: {host!a} is no address ({_reason(error)}); allowed: {_HOSTS}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # right after a service that has ended
    try:
        listener.bind(place)
        listener.listen()  # uvicorn does so, too; here it is known to succeed
    except OSError as error:
        listener.close()
        if error.errno in TAKEN:
            raise InputError(
                f"--port: {port} on {host} {TAKEN[error.errno]}; allowed: another port, or 0 for one that is free"
            ) from None
        raise InputError(f"--host: cannot listen on {host!a} ({_reason(error)}); allowed: {_HOSTS}") from None
    where, number = listener.getsockname()[:2]
    beyond = not ipaddress.ip_address(where.partition("%")[0]).is_loopback
    shown = f"[{host}]" if ":" in host else host
    door = Door(token or new_token(), demanded=beyond or token is not None)
    return Port(listener, number, f"http://{shown}:{number}", door, given=token is not None)


def serve(config: Config, port: Port, runs: int, say: Callable[[str], None]) -> None:
    """Answer requests until the process is told to stop; ``say`` is told the address once the model is there.

    Raises InputError where the configuration is none of a black-box model, or its model cannot be made.
    """

    def ready() -> None:
        say(f"serving at {port.address}; Ctrl-C ends it")
        if (what := _needs_token(config, port)) and not port.given:
            say(f"{what} needs the token: export {VARIABLE}={port.door.token}")

    server = Server(endpoint(config, runs, port.door), ready)
    with left_for_this_user(port.door.token, port.number):
        server.run([port.socket])


def endpoint(config: Config, runs: int, door: Door) -> Endpoint:
    """What answers for the model of a configuration, to so many runs where clients have a budget."""
    if not config.is_blackbox:
        raise InputError(
            f"local.optimizer: '{config.local.optimizer}' trains on gradients, which no service gives; allowed: "
            "algorithm.name=fedbbpt, or another zeroth-order optimizer"
        )
    data = build_data(config)
    torch.set_num_threads(max(1, int(config.runtime.cpus_per_worker * (config.runtime.workers or 1))))
    scorer = build_scorer(config, len(data.class_names), public_split(data))
    limits = limits_of(config, data, runs)
    about = {
        "bytes": scorer.bytes,
        "classes": len(data.class_names),
        "image_size": config.backbone.image_size,
        "clients": limits.clients,
    }
    return Endpoint(about, Runs(limits), Desk(Batcher(scorer)), door)


class Server(uvicorn.Server):
    """What takes requests to an endpoint; ``ready`` is called once it does."""

    def __init__(self, application: Endpoint, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=LimitedConnection,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_level="error",  # what anybody may cause is no news
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_ANSWERS,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, and take the end of the terminal for what Ctrl-C and SIGTERM are."""
        await super().startup(sockets)
        hangup = getattr(signal, "SIGHUP", None)
        here = threading.current_thread() is threading.main_thread()
        if hangup is not None and here and signal.getsignal(hangup) is not signal.SIG_IGN:
            signal.signal(hangup, self.handle_exit)
        self._ready()


def limits_of(config: Config, data: FederatedData, runs: int) -> Limits:
    """What a run of this configuration may ask: twice its evaluations, as it scores interrupted rounds again."""
    federation = config.federation
    evaluations = federation.rounds // federation.eval_every + 2  # round 0 and the last round
    names = list(build_served(config, None).init(np.random.default_rng(0)))
    evaluation = 2 * evaluations * images_scored(build_algorithm(config), names, data)
    return Limits(federation.clients, config.blackbox.budget, evaluation, runs)


def _needs_token(config: Config, port: Port) -> str:
    """What may be asked with the token alone."""
    if port.door.demanded:
        return "whoever asks"
    return "evaluation by another user than this one" if config.blackbox.budget is not None else ""


_HOSTS = "an address or a name of this machine, 127.0.0.1 for programs on it, 0.0.0.0 for all who can reach it"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
