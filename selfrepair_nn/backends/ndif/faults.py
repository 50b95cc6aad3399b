"""What can go wrong between here and a server: each kind, what to do about it, and how it is recognised."""

import re
from dataclasses import dataclass

from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.shown import shown

LONGEST = 2000


@dataclass(frozen=True)
class Kind:
    """`attempts` is how often a job may fail like this; then it is split if that can help, else given up.

    No attempts means that another one cannot help: the run stops at once. What `passes` is no fault of a job: it is
    waited for, and where that is in vain the same command goes on later.
    """

    meaning: str
    advice: str
    attempts: int = 0
    split: bool = False
    passes: bool = False


# fmt: off
KINDS = {
    "unreachable": Kind("the server does not answer", "check --host and that it is up (`selfrepair doctor --host URL`)", passes=True),
    "crowded": Kind("the server has more requests than it takes", "try again later, with fewer jobs at a time (--in-flight)", passes=True),
    "moved": Kind("the server's address leads to another one", "give that as --host if it is the server's: the key goes nowhere else by itself", passes=True),
    "between": Kind("something else answered in the server's place", "look at what stands between: a proxy (HTTPS_PROXY, NO_PROXY), a page to log in at; and check --host", passes=True),
    "differs": Kind("the host is not what it was, or not what the others are", "leave it out, or run it apart"),
    "clocks": Kind("the server's clock and that of its store of results differ", "have them set; the result waits there, and the same command fetches it", passes=True),
    "not ndif": Kind("what answers is not an NDIF server", "check --host: the address of the API, without a path"),
    "key": Kind("the server does not accept the API key", "set NDIF_API_KEY to a valid one (https://login.ndif.us)"),
    "version": Kind("the server does not accept this version", "install the versions it asks for (`selfrepair doctor --host URL` compares them)"),
    "architecture": Kind("the server builds this model from other modules", "use the server's version of transformers (`selfrepair doctor --host URL` compares them)"),
    "model": Kind("the server cannot serve this model", "choose one that runs there (`selfrepair doctor --host URL` lists them) or have it deployed"),
    "start": Kind("the server failed to start this model", "choose one that runs there (`selfrepair doctor --host URL` lists them) or try again later", 2),
    "time": Kind("the job exceeded the server's time limit", "fewer prompts a job (--batch-size)", 2, True),
    "memory": Kind("the server ran out of memory", "fewer prompts a job (--batch-size) or fewer tokens a pass (--tokens-per-pass)", 2, True),
    "size": Kind("the request or its result is too large", "fewer prompts a job (--batch-size)", 2, True),
    "busy": Kind("the server failed while it had the job", "try again later", 5, True),
    "unheard": Kind("the server was sent the request and never told of the job", "look at the server (`selfrepair doctor --host URL`)", 3),
    "lost": Kind("nothing more was heard of the job", "look at the server (`selfrepair doctor --host URL`); --patience says how long to wait", 2),
    "forgotten": Kind("the server no longer knows the job", "servers keep jobs for a day at most: run the same command sooner", 5),
    "expired": Kind("the server no longer keeps the job's result", "servers keep results for a day at most, or an hour: run the same command sooner", 5),
    "store": Kind("the server's store of results does not hand the result out", "tell whoever runs the server", 2),
    "result": Kind("what came back is not what was asked for", "compare the versions (`selfrepair doctor --host URL`)", 2),
    "code": Kind("the job raised an error there", "compare the versions (`selfrepair doctor --host URL`), and run it with --backend simulated", 2),
}
# fmt: on

# In this order: the first pattern found in what the server says decides.
PATTERNS = {
    "key": r"api key",
    "version": r"client (nnsight|python) version",
    "architecture": r"model architecture on this server doesn't match|cannot switch its attention",
    "model": r"could not deploy|cannot be deployed|not scheduled|CANT_ACCOMMODATE",
    "start": r"error provisioning",
    "time": r"execution timeout",
    "memory": r"out of memory|can't allocate memory|not enough memory|OutOfMemory|MemoryError",
    "size": r"too large|EntityTooLarge|max_publish",
    "busy": (
        r"try again later|reconnecting|evicted|cancelled or preempted|internal server error|ConnectionError|"
        r"EndpointConnectionError|RunnerError|BrokenPipeError|ConnectionReset|EOFError|payload could not be read"
    ),
}


class Fault(SelfRepairError):
    """Something went wrong with a server or a job there; `text` is what it said, keys removed.

    `after` is in how many seconds a server that passes wants to be asked again.
    """

    def __init__(self, kind: str, text: str = "", after: float = 0.0) -> None:
        self.kind, self.text, self.after = kind, shown(text)[-LONGEST:], after
        meaning = KINDS[kind]
        said = f" ({brief(self.text)})" if self.text else ""
        super().__init__(f"{meaning.meaning}{said}: {meaning.advice}")


def brief(text: str) -> str:
    """The line of an answer that says most: the last of a traceback, the first of anything else."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0][:300]


def job_fault(description: str) -> Fault:
    """What a server's report that a job failed means."""
    return Fault(_kind(description) or "code", description)


def refusal(status: int, detail: str) -> Fault:
    """What the answer to a request that was not accepted means: an HTTP status and its text."""
    by_status = {401: "key", 403: "key", 404: "not ndif", 405: "not ndif", 413: "size", 422: "version"}
    kind = by_status.get(status) or _kind(detail) or ("busy" if status >= 500 else "not ndif")
    return Fault(kind, f"HTTP {status}: {detail}")


def _kind(text: str) -> str | None:
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, text, re.IGNORECASE)), None)
