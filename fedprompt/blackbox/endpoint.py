"""The black box as an ASGI application: what it answers, whom it refuses, and what of a request it takes in.

Paths and statuses are those of ``blackbox/http.py``. Every refusal is one line of text, and counts nothing.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from fedprompt.blackbox.access import proves
from fedprompt.blackbox.batching import Desk
from fedprompt.blackbox.npy import from_npy, to_npy
from fedprompt.blackbox.runs import Runs
from fedprompt.blackbox.service import EVALUATION, Request
from fedprompt.errors import InputError, OutOfBudget

LARGEST = 256 * 2**20  # bytes of a request's body
LARGEST_COUNTS = 2**20  # bytes of the counts that a resumed run tells
HELD = 1024 * 2**20  # bytes of all bodies that are held at a time
RUN, CLIENT = r"/(?P<run>[\w-]{1,64})", r"/(?P<client>-1|0|[1-9]\d{0,8})"
ROUTES = {  # by path: the method, and the name of what answers
    re.compile(r"/about", re.ASCII): ("GET", "_about"),
    re.compile(rf"{RUN}/counts", re.ASCII): ("GET", "_counts"),
    re.compile(rf"{RUN}/resume", re.ASCII): ("POST", "_resume"),
    re.compile(rf"{RUN}{CLIENT}/scores", re.ASCII): ("POST", "_scores"),
}
KNOWN = "GET /about, GET /RUN/counts, POST /RUN/resume, POST /RUN/CLIENT/scores?request=N"
NUMBER = re.compile(r"\d{1,9}(\.\d{1,9}){0,7}", re.ASCII)  # of a request
OWN_HOSTS = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.ASCII)


class Refusal(Exception):
    """A request that is not answered: the status, one line, and headers."""

    def __init__(self, status: int, line: str, **headers: str) -> None:
        super().__init__(line)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class Door:
    """Who is let in: whoever knows the token where ``demanded``, else any program of this machine, but no web page."""

    token: str
    demanded: bool

    def check(self, http: HttpRequest) -> None:
        """Raise Refusal for whoever may ask nothing here."""
        if self.demanded:
            self.check_token(http, "this service")
        elif "origin" in http.headers or OWN_HOSTS.fullmatch(http.headers.get("host", "localhost")) is None:
            raise Refusal(403, "asked by a web page or in another host's name; allowed: programs that name localhost")

    def check_token(self, http: HttpRequest, what: str) -> None:
        """Raise Refusal for whoever does not know the token."""
        if not proves(http.headers.get("authorization"), self.token):
            line = f"{what} demands the token; allowed: the header Authorization: Bearer TOKEN"
            raise Refusal(401, line, **{"www-authenticate": "Bearer"})


class Endpoint:
    """Answers requests for a model that takes images of ``about['image_size']`` and has ``about['classes']``."""

    def __init__(self, about: dict[str, int], runs: Runs, desk: Desk, door: Door) -> None:
        self._facts, self._runs, self._desk, self._door = about, runs, desk, door
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        http = HttpRequest(scope, receive)
        try:
            response = await self._answer(http)
        except ClientDisconnect:
            return
        except OutOfBudget as refusal:
            response = PlainTextResponse(str(refusal), 429)
        except InputError as error:
            response = PlainTextResponse(str(error), 403)
        except Refusal as refusal:
            response = PlainTextResponse(str(refusal), refusal.status, refusal.headers)
        await response(scope, receive, send)

    async def _answer(self, http: HttpRequest) -> Response:
        self._door.check(http)
        for path, (method, name) in ROUTES.items():
            if (found := path.fullmatch(http.scope["path"])) is not None:
                if http.method != method:
                    raise Refusal(405, f"{_short(http.method)} is not possible here; allowed: {KNOWN}", allow=method)
                return await getattr(self, name)(http, **found.groupdict())
        raise Refusal(404, f"not found; allowed: {KNOWN}")

    async def _about(self, http: HttpRequest) -> Response:
        _query(http)
        return JSONResponse(self._facts)

    async def _counts(self, http: HttpRequest, run: str) -> Response:
        _query(http)
        return JSONResponse({str(client): count for client, count in self._runs.counts(run).items()})

    async def _resume(self, http: HttpRequest, run: str) -> Response:
        """Make a run known, with what it has asked before: of this service, or of one that ran in its place."""
        _query(http)
        async with self._body(http, LARGEST_COUNTS) as body:
            counts = _told(body)
        self._runs.check(run, *counts)
        self._runs.ledger(run).resume(counts)
        return Response(status_code=204)

    async def _scores(self, http: HttpRequest, run: str, client: str) -> Response:
        request = _number(_query(http, "request")["request"])
        self._runs.check(run, int(client))  # before anything is taken in
        if int(client) == EVALUATION and self._runs.have_budgets:
            self._door.check_token(http, "evaluation, which is beside the clients' budgets,")
        async with self._body(http, LARGEST) as body:
            images = await asyncio.to_thread(self._images, body)
            scores = await self._desk.scores(self._runs.ledger(run), int(client), images, request)
        return Response(to_npy(scores), media_type="application/octet-stream")

    def _images(self, body: bytearray) -> np.ndarray:
        size = self._facts["image_size"]
        try:
            images = from_npy(body)
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        if images.shape[1:] != (3, size, size) or not len(images):
            line = f"{images.dtype} {images.shape}; allowed: float32 [n, 3, {size}, {size}], n from 1"
            raise Refusal(400, line)
        if not ((images >= 0) & (images <= 1)).all():  # not a number is neither
            raise Refusal(400, "pixels that are no numbers from 0 to 1; allowed: 0 (black) to 1 (white)")
        return images

    @asynccontextmanager
    async def _body(self, http: HttpRequest, largest: int) -> AsyncIterator[bytearray]:
        """Hold the body, of which no more is taken in than is allowed."""
        too_large = Refusal(413, f"the body is too large; allowed: {largest} bytes")
        length = http.headers.get("content-length", "0")
        if re.fullmatch(r"\d{1,20}", length, re.ASCII) is None:
            raise Refusal(400, f"content-length {_short(length)}; allowed: a number of bytes")
        if int(length) > largest:
            raise too_large
        body = bytearray()
        try:
            async for chunk in http.stream():
                if len(body) + len(chunk) > largest:
                    raise too_large
                if self._held + len(chunk) > HELD:
                    raise Refusal(503, "too many requests at a time; try again", **{"retry-after": "2"})
                self._held += len(chunk)
                body += chunk
            yield body
        finally:
            self._held -= len(body)


def _query(http: HttpRequest, *names: str) -> dict[str, str]:
    """The parameters of the query, each of which must be there once, and no other."""
    given = http.query_params.multi_items()
    if sorted(name for name, _ in given) != sorted(names):
        allowed = ", ".join(names) or "none"
        raise Refusal(400, f"query parameters {_short([name for name, _ in given])}; allowed, once each: {allowed}")
    return dict(given)


def _number(text: str) -> Request:
    if NUMBER.fullmatch(text) is None:
        raise Refusal(400, f"request {_short(text)}; allowed: up to eight numbers below 10^9 with dots between, as 1.0")
    return tuple(int(part) for part in text.split("."))


def _told(body: bytearray) -> dict[int, int]:
    """What a run says that its clients have asked."""
    allowed = "allowed: a JSON object of numbers of queries by client"
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, f"no JSON; {allowed}") from None
    if not isinstance(told, dict):
        raise Refusal(400, f"JSON, but no object; {allowed}")
    for client, count in told.items():
        if re.fullmatch(r"-1|\d{1,9}", client, re.ASCII) is None or type(count) is not int or not 0 <= count < 2**53:
            raise Refusal(400, f"{_short(client)}: {_short(count)}; {allowed}")
    return {int(client): count for client, count in told.items()}


def _short(value: object) -> str:
    """Something from outside, in a few characters of one line."""
    text = ascii(value) if not isinstance(value, int) else ("a number" if abs(value) >= 2**53 else str(value))
    return text if len(text) <= 60 else text[:57] + "..."
