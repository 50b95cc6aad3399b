"""The errors a user can meet. Each message names the bad value, lists the valid ones and says what to do.

What others wrote may be part of a message: it is filtered here, where every message is made.
"""

from selfrepair_nn.shown import line
from selfrepair_nn.shown import message as filtered


class SelfRepairError(Exception):
    """Something failed that is not the caller's spelling: a model, a store, a disk. Exit code 1.

    What a caller gave, however long, leaves room in the message for what is said of it.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(filtered(message))


class UsageError(SelfRepairError):
    """What was asked for does not exist or does not fit. Exit code 2."""

    exit_code = 2


class NotAgreed(UsageError):
    """A remote run that was not started: `plan` says what it would have done, the message what to add. Exit code 2."""

    def __init__(self, plan: str, remedy: str) -> None:
        self.plan = plan
        super().__init__(f"nothing was sent: {remedy}")


class UnsupportedModel(SelfRepairError):
    """The model cannot be decomposed exactly, so no number is given for it."""


class StoreError(SelfRepairError):
    """A store cannot be created, opened, resumed or written."""


class Incomplete(SelfRepairError):
    """The run stopped before its end; what was computed is kept and the same call resumes it. Exit code 75."""

    exit_code = 75


def one_line(error: BaseException) -> str:
    """Kind and message of an error, on one line; filtered before it is cut, so that no part of a key is left."""
    return f"{type(error).__name__}: {line(' '.join(str(error).split()), 300)}"
