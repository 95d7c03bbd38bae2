"""Where a service is, and the token that it demands: out of the environment and never out of a configuration.

A configuration is written into the run's folder, to TensorBoard and into reports; an environment variable is not.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from fedprompt.errors import InputError

VARIABLE = "FEDPROMPT_TOKEN"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FORM = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")  # what a header may hold (RFC 6750), and nothing that can be guessed


def given_token() -> str | None:
    """The token in the environment, or None; InputError, which does not show it, where it has not a token's form."""
    token = os.environ.get(VARIABLE) or None
    if token is not None and _FORM.fullmatch(token) is None:
        raise InputError(
            f"{VARIABLE}: holds {len(token)} characters, not all of them allowed in a token; allowed: 16 to 256 of "
            "A-Z a-z 0-9 . _ ~ + / = -"
        )
    return token


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(32)


@contextmanager
def left_for_this_user(token: str, port: int) -> Iterator[None]:
    """Leave a token in a file where programs of this user on this machine find it, as long as the service is there.

    Where there is no home to leave it in, whoever asks has to be told the token.
    """
    path = _file(port)
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a service that was killed
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_text() == token:
                path.unlink()


def token_for(address: str) -> str | None:
    """The token for a service: what the environment holds, else what a service on this machine's loopback has left."""
    parts = urlsplit(address)
    if (token := given_token()) is not None or parts.hostname not in LOOPBACK:
        return token
    try:
        return _file(parts.port or 80).read_text()
    except OSError:
        return None  # most services on loopback demand none


def _file(port: int) -> Path:
    return Path(os.path.expanduser("~/.fedprompt"), f"{socket.gethostname()}-{port}.token")


def header_of(token: str) -> str:
    """The value of the header ``Authorization`` that proves that its sender knows the token."""
    return f"Bearer {token}"


def proves(header: str | None, token: str) -> bool:
    """Whether the header ``Authorization`` of a request holds the token; takes as long for any wrong one."""
    return hmac.compare_digest((header or "").encode("utf-8", "surrogateescape"), header_of(token).encode())


def check_address(address: str) -> None:
    """Raise InputError where an address is none, or says more than where the service is."""
    try:
        parts = urlsplit(address)
        well_formed = bool(parts.hostname) and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed or parts.scheme not in ("http", "https") or re.search(r"[\s\x00-\x1f\x7f]", address):
        raise InputError(f"blackbox.address: {address!a} is no address; allowed: http://HOST:PORT or https://HOST:PORT")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            "blackbox.address: holds more than an address, and is written into the run's folder; allowed: "
            f"{parts.scheme}://HOST:PORT, with the token in the environment variable {VARIABLE}"
        )
