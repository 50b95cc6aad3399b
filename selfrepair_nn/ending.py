"""Signals that end a run: by hand, by a scheduler, by a terminal that was closed."""

import signal

HANGUP = getattr(signal, "SIGHUP", None)
ENDING = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number)
SENT_TO_ALL = tuple(number for number in (signal.SIGINT, HANGUP) if number)
"""What a terminal sends to every process that was started from it."""


def heard() -> tuple[int, ...]:
    """Those that end a run here: under `nohup` a terminal that closes does not."""
    return tuple(n for n in ENDING if n != HANGUP or signal.getsignal(n) is not signal.SIG_IGN)


def interrupted() -> None:
    """To be called once an interrupt was caught: the exit code is then what is chosen, and another one changes nothing.

    Python ends as killed by SIGINT if one fell into code that was made from text, as dataclasses are; running such
    code again makes it forget that.
    """
    for number in SENT_TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    exec("")
