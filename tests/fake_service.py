"""A server that exists only in a test: its jobs, its faults and its clock are the test's to decide."""

import itertools
import pickle
from dataclasses import dataclass, field

import torch

from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.server import Answer
from selfrepair_nn.layout.units import Unit

POSITIONS = 3
MINUTES = 60.0


class Killed(BaseException):
    """The client's process ends here, as by kill -9."""


@dataclass
class Clock:
    """A clock that stands still but for `sleep`."""

    now: float = 1.7e9

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Job:
    """What the server has of one request: when it is done, and what then becomes of it."""

    unit: tuple
    done: float
    outcome: str


@dataclass
class FakeService:
    """A server as the flight sees it.

    `outcomes` are used up one for each request that is sent:
        ok           the result comes back
        slow         the same, after ten minutes
        never        it runs for ever
        refused      the server says no before it takes the job
        vanishes     the request breaks off and never arrives
        in doubt     the request breaks off, but arrived
        renamed      the server gives the job another id
        unheard      the server takes the job and never tells of it
        forgotten    the server has the job, and has not when it would be done
        expired      the result is gone when it is fetched
        crooked      the result has another shape
        nan          a number of the result is not finite
        anything else is what the server says when the job fails
    then all is ok. `kill_at` is the number of the step (a call, or half of one) before which the client is killed.
    `capacity` is how many case x prompt pairs fit into its memory.
    """

    clock: Clock
    outcomes: list[str] = field(default_factory=list)
    capacity: int = 10**9
    kill_at: int | None = None
    jobs: dict[str, Job] = field(default_factory=dict)
    sent: list[tuple] = field(default_factory=list)
    steps: int = 0
    names: itertools.count = field(default_factory=itertools.count)

    doubt = ""
    name = "http://fake"

    def greet(self, anew: bool = False) -> None:
        self.step()

    def step(self) -> None:
        if self.steps == self.kill_at:
            self.kill_at = None
            raise Killed
        self.steps += 1

    def pack(self, unit: Unit) -> bytes:
        return pickle.dumps(described(unit))

    def send(self, request: bytes, job: str) -> str | None:
        self.step()
        outcome = self.outcomes.pop(0) if self.outcomes else "ok"
        unit = pickle.loads(request)
        if outcome == "refused":
            raise Fault("busy", "HTTP 500: no room")
        if outcome == "vanishes":
            return None
        name = f"{job}-as-{next(self.names)}" if outcome == "renamed" else job
        wait = 10 * MINUTES if outcome == "slow" else 0.3
        self.jobs[name] = Job(unit, self.clock() + wait, outcome)
        self.sent.append(unit)
        self.step()
        return None if outcome == "in doubt" else name

    def ask(self, job: str) -> Answer | None:
        self.step()
        known = self.jobs.get(job)
        if known is None or known.outcome == "unheard":
            return None
        if known.outcome == "forgotten" and self.clock() >= known.done:
            return None
        if known.outcome == "never" or self.clock() < known.done:
            return Answer("RUNNING", "Your job has started running.", None)
        if known.outcome in FINE | {"expired", "crooked", "nan"}:
            if len(known.unit[2]) * len(known.unit[1]) > self.capacity:
                return Answer("ERROR", "torch.OutOfMemoryError: CUDA out of memory.", None)
            return Answer("COMPLETED", "Your job has been completed.", job)
        return Answer("ERROR", known.outcome, None)

    def fetch(self, address: str) -> tuple[dict, int]:
        self.step()
        job = self.jobs[address]
        if job.outcome == "expired":
            raise Fault("expired", "HTTP 404: NoSuchKey")
        found = computed(*job.unit)
        if job.outcome == "crooked":
            found["changes"] = found["changes"][..., :1]
        if job.outcome == "nan":
            found["changes"][0, 0, 0] = float("nan")
        return found, 1000


FINE = {"ok", "slow", "in doubt", "renamed"}


def described(unit: Unit) -> tuple:
    """What a request says: the job's kind, its prompts, its cases."""
    return unit.name, list(range(unit.prompts.start, unit.prompts.stop)), unit.plan["cases"]


def computed(name: str, prompts: list[int], cases: list[int]) -> dict:
    """What a job gives: a number for each case, prompt and position that no other has, and a sum over prompts."""
    tokens = torch.tensor(prompts, dtype=torch.float32)[:, None] + torch.arange(POSITIONS) / POSITIONS
    changes = torch.tensor(cases, dtype=torch.float32)[:, None, None] * 1000 + tokens
    return {"logit": tokens, "changes": changes, "sums": {"z": {0: tokens.double().sum((0, 1))[None]}}}


def unit(start: int, stop: int, cases: int = 4, name: str = "work") -> Unit:
    """A unit of work whose result is `computed`."""
    shapes = {
        "logit": ("prompt", POSITIONS),
        "changes": ("case", "prompt", POSITIONS),
        "sums": {"z": {0: (1,)}},
    }
    return Unit(name, computed, slice(start, stop), {"cases": list(range(cases))}, lambda prompts: {}, shapes)


def assert_right(unit: Unit, found: dict) -> None:
    """The result is the whole unit's, whatever parts it came in."""
    wanted = computed(*described(unit))
    assert found.keys() == wanted.keys()
    assert torch.equal(found["logit"], wanted["logit"])
    assert torch.equal(found["changes"], wanted["changes"])
    assert torch.equal(found["sums"]["z"][0], wanted["sums"]["z"][0])
