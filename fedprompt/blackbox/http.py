"""A service behind an HTTP address, as a client sees it; ``blackbox/endpoint.py`` is the other end.

    POST /RUN/CLIENT/scores?request=1.0   images as a .npy of float32 [n, 3, S, S] -> log-probabilities as a .npy [n, K]
    POST /RUN/resume                      queries before this part of the run by client, as JSON -> nothing
    GET  /RUN/counts                      -> queries so far by client, as JSON
    GET  /about                           -> the model's ``bytes``, ``classes``, ``image_size`` and ``clients``, as JSON

Bad input is status 400, a missing token 401, an unknown run or client 403, a path that does not exist 404, another
method 405, a client that is too slow 408, a body that is too large 413, a budget that is used up 429, a busy service
503, each with one line of text. ``RUN`` is the name under which a run's clients are known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np

from fedprompt.blackbox.access import VARIABLE, check_address, header_of, token_for
from fedprompt.blackbox.npy import from_npy, to_npy
from fedprompt.blackbox.service import Request, is_answerable, no_scores
from fedprompt.errors import InputError, OutOfBudget

REFUSED = 429
AGAIN = (408, 500, 502, 503, 504)  # statuses after which a request is sent again
PAUSES = (0.5, 2, 8)  # seconds before a request that got no answer is sent again
PATIENCE = 300  # seconds for one answer
LARGEST = 256 * 2**20  # bytes of an answer
FACTS = {"bytes", "classes", "image_size", "clients"}


class HttpService:
    """Asks ``address`` in a run's name, with the token that is in the environment.

    Raises OSError where nobody answers, InputError where it is asked wrong or the address is none.
    """

    def __init__(self, address: str, run: str) -> None:
        check_address(address)
        self._address, self._run, self._token = address.rstrip("/"), run, token_for(address)

    def scores(self, client: int, images: np.ndarray, request: Request) -> np.ndarray:
        """Send the images and wait for their scores; sent again where no answer comes."""
        if not is_answerable(images):
            return no_scores(images, self._about["classes"])
        number = ".".join(map(str, request))
        answer = self._ask(f"{self._run}/{client}/scores?request={number}", to_npy(images.astype(np.float32)))
        try:
            scores = from_npy(answer)
        except ValueError as error:
            raise self._unknown(str(error)) from None
        if scores.shape != (expected := (len(images), self._about["classes"])):
            raise self._unknown(f"scores of shape {scores.shape}, not {expected}")
        return scores

    def counts(self) -> dict[int, int]:
        """Queries so far by client."""
        return {int(client): count for client, count in self._numbers(f"{self._run}/counts").items()}

    def model_bytes(self) -> int:
        """Size of the model's weights."""
        return self._about["bytes"]

    def resume(self, counts: Mapping[int, int]) -> None:
        """Tell a restarted service what the run has asked before; one that knows more keeps what it knows."""
        self._ask(f"{self._run}/resume", json.dumps({str(client): n for client, n in counts.items()}).encode())

    def check(self, classes: int, image_size: int, clients: int) -> None:
        """Make the run known. Raises InputError where that fails, or the service is for other images or classes."""
        try:
            about = self._about
        except OSError as error:
            raise InputError(
                f"blackbox.address: no service at '{self._address}' ({error.strerror}); allowed: the address that "
                "`fedprompt serve` prints"
            ) from None
        for name, key, ours in (("classes", "data.name", classes), ("image_size", "backbone.image_size", image_size)):
            if about[name] != ours:
                raise InputError(
                    f"{key}: {name} is {ours} here and {about[name]} at {self._address}; allowed: what the service has"
                )
        if clients > about["clients"]:
            raise InputError(
                f"federation.clients: {clients} here and {about['clients']} at {self._address}; allowed: at most those"
            )
        self.resume({})

    @cached_property
    def _about(self) -> dict[str, int]:
        about = self._numbers("about")
        if not about.keys() >= FACTS:
            raise self._unknown(f"told {', '.join(about) or 'nothing'}")
        return about

    def _numbers(self, path: str) -> dict[str, int]:
        """A JSON object of whole numbers."""
        try:
            told = json.loads(self._ask(path))
        except (ValueError, RecursionError):
            raise self._unknown("no JSON") from None
        if not isinstance(told, dict) or not all(type(number) is int for number in told.values()):
            raise self._unknown("no JSON object of numbers")
        return told

    def _unknown(self, found: str) -> OSError:
        return OSError(0, f"what answers is no service of `fedprompt serve`: {found}", self._address)

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        http = HttpRequest(f"{self._address}/{path}", body)
        if self._token is not None:
            http.add_unredirected_header("Authorization", header_of(self._token))  # to this address and no other
        for pause in (*PAUSES, None):
            try:
                with urlopen(http, timeout=PATIENCE) as answer:
                    return answer.read(LARGEST)
            except HTTPError as error:
                problem = self._problem(error)
            except (URLError, HTTPException, OSError, ValueError) as error:
                problem = str(getattr(error, "reason", error))
            if pause is None or body is None:
                break
            time.sleep(pause)
        raise OSError(0, problem, self._address)

    def _problem(self, error: HTTPError) -> str:
        """What the service says, where it may say something else when it is asked again; else raised."""
        said = " ".join(error.read(2000).decode(errors="replace").split())
        if error.code == REFUSED:
            raise OutOfBudget(said) from None
        if error.code == 401:
            raise InputError(
                f"{VARIABLE}: {'not the' if self._token else 'no'} token of {self._address} ({said}); allowed: this "
                "environment variable with the token that `fedprompt serve` printed"
            ) from None
        if 400 <= error.code < 500 and error.code not in AGAIN:
            raise InputError(f"{self._address}: {said or error.reason}") from None
        return f"{error.code} {said or error.reason}"
