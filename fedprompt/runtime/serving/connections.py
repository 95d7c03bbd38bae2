"""Connections of a web server that are not kept open for whoever is slow, and no more of them than there is room for.

uvicorn gives up on connections that are idle. Here all phases have a time limit, whatever trickles in: a request's line
and headers, its body, and taking the answer. Computing the answer has none.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 256
HEADERS, BODY, ANSWER = 10.0, 60.0, 60.0  # seconds
TOO_MANY = "503 Service Unavailable", "too many connections; try again"
TOO_SLOW = "408 Request Timeout", f"too slow; allowed: {HEADERS:g} s for the headers, {BODY:g} s for the body"


class LimitedConnection(H11Protocol):
    """One connection; tried with uvicorn 0.54 and h11 0.16."""

    _phase: Any = None
    _limit: asyncio.TimerHandle | None = None  # of what the client sends
    _answer_limit: asyncio.TimerHandle | None = None  # of what it takes

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._end(*TOO_MANY)
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_limit = self.loop.call_later(ANSWER, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._answer_limit)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, and one whose client has not taken the end of its answer."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in place of the request that it is part of; nothing where that has been answered."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        super().send_400_response(msg)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # or the application would answer, too
            self.cycle.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._limit)
        _cancel(self._answer_limit)
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock where another phase begins: headers, body, or neither."""
        phase = self.conn.their_state
        if phase is self._phase:
            return
        self._phase = phase
        _cancel(self._limit)
        seconds = {h11.IDLE: HEADERS, h11.SEND_BODY: BODY}.get(phase)
        self._limit = None if seconds is None else self.loop.call_later(seconds, self._end, *TOO_SLOW)

    def _end(self, status: str, line: str) -> None:
        """Close the connection, with an answer where none has been begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.get_write_buffer_size():
            headers = f"content-type: text/plain\r\ncontent-length: {len(line)}\r\nconnection: close"
            self.transport.write(f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n{line}".encode())
            self.transport.close()
        else:
            self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
