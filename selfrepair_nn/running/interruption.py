"""Stopping between two units: a signal is never lost, whatever Python code it happens to arrive in."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selfrepair_nn.ending import SENT_TO_ALL, heard

POSIX = hasattr(signal, "pthread_sigmask")


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Within, what ends a run raises KeyboardInterrupt; the function given raises it again if it was swallowed.

    Python drops what is raised inside finalisers and weak references' callbacks, so that a Ctrl-C can go unheard.
    """
    received: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, interrupt) for number in heard()}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within, what ends a run waits until its end: for what must not stop half-way, such as the start of a process.

    Processes that are started within never see what a terminal sends to all, such as a Ctrl-C: it is for this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in heard()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL) if POSIX else None
    try:
        yield
    finally:
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received[:1]:
        signal.raise_signal(number)
