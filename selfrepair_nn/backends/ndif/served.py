"""A model on an NDIF server as a backend: its requests, what is asked of it before the first, what is kept of it."""

from typing import Any, cast

from nnsight import register
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend as Tracing

from selfrepair_nn.backends.local import only, tell
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import Ledger
from selfrepair_nn.backends.ndif.server import Answer, Server
from selfrepair_nn.errors import SelfRepairError, one_line
from selfrepair_nn.layout.greeting import first_unit
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.greeting import greeting_of
from selfrepair_nn.models.model import Model
from selfrepair_nn.options import Options
from selfrepair_nn.tracing.session import RESULT, hand_over

SHARED = ("python", "torch", "transformers", "nnsight", "ndif")
"""Packages of the server whose versions are kept with the numbers."""


class ServedModel:
    """A model on a server: units become requests to it, and its answers results."""

    def __init__(self, server: Server, model: Model) -> None:
        self.server, self.model = server, model
        self.key, self._environment = model_key(model), model.nn._remoteable_get_env()

    def pack(self, unit: Unit) -> bytes:
        return packed(self.model, unit)

    def send(self, request: bytes, job: str) -> str | None:
        return self.server.send(request, self.key, self._environment, job)

    def ask(self, job: str) -> Answer | None:
        return self.server.ask(job)

    def fetch(self, address: str) -> tuple[Any, int] | None:
        found = self.server.fetch(address)
        return (found[0].get(RESULT), found[1]) if found else None


def packed(model: Model, unit: Unit) -> bytes:
    """A unit's session and its arrays as a server takes them: our code by value, serialised and compressed."""
    register("selfrepair_nn")
    request = _Kept()
    hand_over(unit.job, model.nn, unit.arrays, unit.plan, request)
    return request.blob


class _Kept(Tracing):
    """An nnsight backend that keeps the request instead of sending it."""

    def __call__(self, tracer: Any) -> None:
        self.blob = RequestModel.serialize(tracer, compress=True)


def server_of(options: Options) -> Server:
    """The server that the options name; what it has to say goes to stderr."""
    return Server(options.host, options.patience, tell)


def model_key(model: Model) -> str:
    """What servers call this model.

    Raises:
        SelfRepairError: the hub, which knows the proper spelling of its name, does not answer.
    """
    try:
        return model.nn.to_model_key()
    except Exception as error:
        raise SelfRepairError(
            f"the hub does not say how {model.name!r} is properly spelt ({one_line(error)}): "
            "check the name, HF_ENDPOINT and the connection"
        ) from error


def states(served: ServedModel) -> str:
    """How the server stands to the model: running, deploying … or not deployed.

    Raises:
        Fault: the server does not say.
    """
    found = [d for d in served.server.status() if d.get("model_key") == served.key]
    known = [str(d.get("application_state", "unknown")).lower() for d in found]
    return "running" if "running" in known else (known[0] if known else "not deployed")


def require_ready(served: ServedModel, name: str) -> None:
    """Say so if the model does not run there yet: the first job then waits for it, or fails.

    Raises:
        Fault: no NDIF server answers.
    """
    served.server.greet()
    state = states(served)
    if state != "running":
        tell(
            f"{name} is {state} at {served.server.host}: the first job waits until it runs, or says why it cannot"
        )


def deployed(served: ServedModel) -> dict[str, Any]:
    """What the server says of the model's replicas, for `models.greeting.greeting_of`: nothing where they differ.

    A replica that NDIF's tensor-parallel actor serves is split among as many processes as it has GPUs.

    Raises:
        Fault: the server does not say.
    """
    said = set()
    for each in served.server.status():
        if each.get("model_key") == served.key and each.get("actor_class"):
            split = ".tp." in each["actor_class"]
            said.add((each.get("dtype"), each.get("gpus") if split else 1))
    return dict(zip(("weights_in", "tensor_parallel"), said.pop(), strict=True)) if len(said) == 1 else {}


def greeted(jobs: JobsInFlight) -> dict[str, Any]:
    """Which model answers there: the greeting that `models.greeting` says, and compares with another.

    Raises:
        Fault, Incomplete: as the server says, or does not say.
    """
    served = cast(ServedModel, jobs.service)
    found = only(jobs, first_unit(served.model.layout))
    return greeting_of(found, deployed(served))


def jobs_in_flight(options: Options, model: Model, ledger: Ledger) -> JobsInFlight:
    """The backend for the options' server, which answers. Raises Fault as the server says."""
    served = ServedModel(server_of(options), model)
    require_ready(served, model.name)
    return JobsInFlight(served, ledger, options.in_flight, options.patience, tell)


def connected(options: Options, model: Model, ledger: Ledger) -> tuple[JobsInFlight, dict[str, Any]]:
    """The backend, once the server has answered and run the model, and what is to be kept of the server.

    That is dtype, what it computes in, server: its address and versions, and its greeting.

    Raises:
        Fault, Incomplete: as the server says, or does not say.
    """
    jobs = jobs_in_flight(options, model, ledger)
    greeting = greeted(jobs)
    server = cast(ServedModel, jobs.service).server
    versions = server.environment()
    kept = {"host": server.host} | {name: versions[name] for name in SHARED if name in versions}
    return jobs, {"dtype": greeting["computes_in"], "server": kept, "greeting": greeting}


def traffic(ledger: Ledger) -> dict[str, int]:
    """Jobs sent for a store so far, and the bytes of their requests and results."""
    records = ledger.records.values()
    return {
        "jobs": sum(r.jobs for r in records),
        "bytes_sent": sum(r.bytes_sent for r in records),
        "bytes_returned": sum(r.bytes_returned for r in records),
    }
