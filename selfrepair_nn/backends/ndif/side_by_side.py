"""Several hosts spoken to at once, each in a thread of its own, so that none waits for another's cold start."""

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from threading import Event, Thread
from typing import TypeVar

from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.in_flight import Watch
from selfrepair_nn.errors import Incomplete

LOOK_SECONDS = 0.2
"""Between two looks at how all of them stand."""

Said = TypeVar("Said")
Call = Callable[[Watch], Said]


class _Over(BaseException):
    """Nobody waits any more."""


def side_by_side(calls: Mapping[str, Call[Said]], watch: Watch) -> dict[str, Said | Fault | Incomplete]:
    """What the call of each name gives, or the Fault or Incomplete that it raises, in the order of the names.

    Each tells a watch of its own how it stands; `watch`, which is called in this thread alone, takes how all do. A
    single one runs in this thread. Once that is interrupted, or one call raises anything else, which is raised here,
    the others end when they next tell how they stand.
    """
    if len(calls) == 1:
        return {name: _said(call, watch) for name, call in calls.items()}
    states, over = dict.fromkeys(calls, ""), Event()
    futures = {name: Future[Said | Fault | Incomplete]() for name in calls}

    def speak(name: str) -> None:
        def stands(state: str) -> None:
            if over.is_set():
                raise _Over
            states[name] = state

        try:
            futures[name].set_result(_said(calls[name], stands))
        except BaseException as error:
            futures[name].set_exception(error)
        states[name] = ""

    try:
        for name in calls:
            Thread(target=speak, args=[name], daemon=True).start()
        waiting = True
        while waiting:
            done, waiting = wait(futures.values(), LOOK_SECONDS, FIRST_EXCEPTION)
            for each in done:
                each.result()
            watch("; ".join(f"{name}: {state}" for name, state in states.items() if state))
    finally:
        over.set()
    return {name: future.result() for name, future in futures.items()}


def _said(call: Call[Said], watch: Watch) -> Said | Fault | Incomplete:
    try:
        return call(watch)
    except (Fault, Incomplete) as error:
        return error
