"""Ctrl-C, SIGTERM and SIGHUP: all three ask a command to stop, and a second one does not disturb what the first began.

A signal that the command was started with as ignored stays ignored: ``nohup`` ignores SIGHUP, a shell's ``&`` SIGINT.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import TypeVar

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN = 0.05  # seconds until an interrupt that Python has dropped is raised once more
HOLD = 10.0  # seconds after an interrupt in which another one is ignored, so that a checkpoint can be written
T = TypeVar("T")
Handler = Callable[[int, FrameType | None], None]
Hook = Callable[["sys.UnraisableHookArgs"], object]


class _State:
    """What this process was asked; signals concern a process as a whole."""

    asked = False  # to stop, since ``terminated_as_interrupt`` was entered
    held_until = 0.0  # no other interrupt is raised before
    deferred = 0  # depth of ``deferred``


def end_at_once(line: str) -> None:
    """From here on let a signal print ``line`` and end the process with code 1: for a start that has nothing to save.

    To raise KeyboardInterrupt in the middle of an import would not do: C code swallows it, or aborts.
    """

    def end(*_: object) -> None:
        if not _State.asked:  # else the process is about to end, and says so itself
            try:
                os.write(2, f"{line}\n".encode())
            finally:
                os._exit(1)

    _install(end)


def ignore() -> None:
    """From here on ignore all three: the command has said its last word."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Let all three raise KeyboardInterrupt inside, so that each saves a checkpoint; again only after ``HOLD``."""
    _State.asked, _State.held_until = False, 0.0
    previous, hook = _install(_interrupt), sys.unraisablehook
    sys.unraisablehook = _raised_again(hook, next(iter(previous), None))
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Raise KeyboardInterrupt only at the end of what must not be left half done.

    Processes that are started inside have SIGHUP blocked: the end of a terminal is for this process alone to handle.
    """
    hangup = {signal.SIGHUP} if hasattr(signal, "SIGHUP") else set()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, hangup)
    _State.deferred += 1
    missed = _State.asked
    try:
        yield
    finally:
        _State.deferred -= 1
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _State.asked and not missed:
        check()


@contextmanager
def undisturbed(context: AbstractContextManager[T]) -> Iterator[T]:
    """Enter a context whole, whatever signal comes meanwhile."""
    with ExitStack() as stack:
        with deferred():
            entered = stack.enter_context(context)
        yield entered


def again() -> None:
    """Let the next signal interrupt at once: there is a wait that it may cut short."""
    _State.held_until = 0.0


def check() -> None:
    """Raise KeyboardInterrupt where one was asked for: whatever swallowed it, as C code may, does not keep it."""
    if _State.asked:
        _State.held_until = time.monotonic() + HOLD
        raise KeyboardInterrupt


def asked() -> bool:
    """Whether a signal has asked to stop."""
    return _State.asked


def _interrupt(*_: object) -> None:
    _State.asked = True
    if not _State.deferred and time.monotonic() >= _State.held_until:
        check()


def _raised_again(hook: Hook, number: int | None) -> Hook:
    """Return ``hook`` for all but interrupts: these are raised anew, by signal ``number``, without a word.

    Python drops what is raised in a destructor or in the callback of a weak reference.
    """

    def heeded(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is not KeyboardInterrupt or number is None:
            hook(dropped)
            return
        _State.held_until = 0.0
        timer = threading.Timer(AGAIN, _send_again, (number,))
        timer.daemon = True
        timer.start()

    return heeded


def _send_again(number: int) -> None:
    """Send this process's main thread a signal, which cuts short what it waits for, unless nobody handles it now."""
    if signal.getsignal(number) is _interrupt:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _install(handler: Handler) -> dict[int, signal.Handlers | Handler | int | None]:
    """Put a handler in the place of those that do not ignore their signal; returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # signals are the main thread's
    before = {number: signal.getsignal(number) for number in NUMBERS}
    heeded: dict[int, signal.Handlers | Handler | int | None]
    heeded = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in heeded:
        signal.signal(number, handler)
    return heeded
