"""A model on an NDIF server as a backend: its requests, what is asked of it before the first, what is kept of it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, cast

import zstandard
from nnsight import register
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend as Tracing

from selfrepair_nn.backends.local import only, tell
from selfrepair_nn.backends.ndif.agreement import clocks_apart, differences, versions_apart
from selfrepair_nn.backends.ndif.faults import KINDS, Fault
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight, Watch, unwatched
from selfrepair_nn.backends.ndif.ledger import Ledger
from selfrepair_nn.backends.ndif.limits import Limits, limits_of, told
from selfrepair_nn.backends.ndif.server import Answer, Server
from selfrepair_nn.backends.ndif.side_by_side import side_by_side
from selfrepair_nn.errors import Incomplete, SelfRepairError, one_line
from selfrepair_nn.layout.greeting import first_unit
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.greeting import greeting_of
from selfrepair_nn.models.model import Model
from selfrepair_nn.options import Options
from selfrepair_nn.shown import LOG
from selfrepair_nn.tracing.session import RESULT, hand_over

SHARED = ("python", "torch", "transformers", "nnsight", "ndif")
"""Packages of the server whose versions are kept with the numbers."""

AGAIN_SECONDS = 30.0
"""A host that was away has so long to say whose weights answer there."""

COMPRESSION = 15
"""Of zstd's levels the last before each byte costs far more time; nnsight takes 6, and sends a fifteenth more."""

PACKING = Lock()
"""nnsight keeps what it traces in one place for all threads."""

UNTOLD = ("_name_or_path", "transformers_version")
"""What a configuration holds that is not the model's."""


class ServedModel:
    """A model on a server: units become requests to it, and its answers results."""

    def __init__(self, server: Server, model: Model) -> None:
        self.server, self.model = server, model
        self.key, self._environment = model_key(model), model.nn._remoteable_get_env()
        self.expected: dict[str, Any] = {}
        self.first_job = ""
        """That in which it was last greeted."""

    @property
    def name(self) -> str:
        return self.server.host

    def greet(self, anew: bool = False) -> None:
        self.server.greet()
        asked = {"greeting": self._greeting()} if anew and self.expected else {}
        if found := self.expected and differences(self.expected, self.facts() | asked):
            raise Fault("differs", f"{self.name}: {'; '.join(found)}")

    def _greeting(self) -> dict[str, Any]:
        """Whose weights answer now; a host that takes long to say so counts as silent, for others wait meanwhile."""
        try:
            with TemporaryDirectory() as folder:
                return greeted(self, Ledger(Path(folder) / "jobs.jsonl", "greeting"), AGAIN_SECONDS)
        except Incomplete as error:
            raise Fault("unreachable", str(error)) from error

    def facts(self) -> dict[str, Any]:
        """What the host says of itself and of the model there: versions, and of a deployed model what identifies it."""
        versions = self.server.environment()
        known = {name: versions[name] for name in SHARED if name in versions}
        return {"host": self.name} | known | _identified(self.replicas())

    def replicas(self) -> list[dict[str, Any]]:
        """What the host says of each deployment of the model. Raises Fault if it does not say."""
        return [each for each in self.server.status() if each.get("model_key") == self.key]

    def pack(self, unit: Unit) -> bytes:
        with PACKING:
            return packed(self.model, unit)

    def send(self, request: bytes, job: str) -> str | None:
        return self.server.send(request, self.key, self._environment, job)

    @property
    def doubt(self) -> str:
        return self.server.doubt

    def ask(self, job: str) -> Answer | None:
        return self.server.ask(job)

    def fetch(self, address: str | bytes) -> tuple[Any, int]:
        found, size = self.server.fetch(address)
        return found.get(RESULT), size


def packed(model: Model, unit: Unit) -> bytes:
    """A unit's session and its arrays as a server takes them: our code by value, serialised and compressed."""
    register("selfrepair_nn")
    request = _Kept()
    hand_over(unit.job, model.nn, unit.arrays, unit.plan, unit.asked, request)
    return request.blob


class _Kept(Tracing):
    """An nnsight backend that keeps the request instead of sending it."""

    def __call__(self, tracer: Any) -> None:
        self.blob = zstandard.compress(RequestModel.serialize(tracer), COMPRESSION)


def servers_of(options: Options) -> list[Server]:
    """The servers that the options name; what they have to say goes to stderr."""
    return [Server(host, options.patience, tell) for host in options.hosts]


def require_answer(options: Options) -> None:
    """Raises Fault, as the last of them says, if no server that the options name answers."""
    faults = []
    for server in servers_of(options):
        try:
            return server.greet()
        except Fault as fault:
            faults.append(fault)
    raise faults[-1]


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
    """How the server stands to the model: running (on how many replicas), deploying … or not deployed.

    Raises:
        Fault: the server does not say.
    """
    replicas = served.server.status()
    found = [d for d in replicas if d.get("model_key") == served.key]
    known = [str(d.get("application_state") or d.get("deployment_level", "unknown")).lower() for d in found]
    if count := known.count("running"):
        return "running" if count == 1 else f"running on {count} replicas"
    if known:
        return {"warm": "kept ready in the host's memory (a short start)"}.get(known[0], known[0])
    cold = any(d.get("deployment_level") == "COLD" and d.get("repo_id") == served.model.name for d in replicas)
    return "not deployed, but downloaded there (a cold start)" if cold else "not deployed"


def _identified(replicas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the model as it is deployed: its revision, size, type and configuration; nothing where it is not."""
    if not replicas:
        return {}
    best = next((d for d in replicas if d.get("application_state") == "RUNNING"), replicas[0])
    named = {"revision": "revision", "n_params": "parameters", "dtype": "deployed_dtype"}
    known = {name: best[key] for key, name in named.items() if best.get(key) is not None}
    try:
        config = {key: value for key, value in json.loads(best["config"]).items() if key not in UNTOLD}
        known["configuration"] = sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        pass
    return known


def limits_there(jobs: JobsInFlight, options: Options, dtype: str) -> Limits:
    """The limits of the hosts that have the jobs, as far as they tell them; `dtype` is what they compute in."""
    import torch

    replicas = list[dict[str, Any]]()
    for host in jobs.hosts.left:
        with suppress(Fault):
            replicas += cast(ServedModel, host.service).replicas()
    found = told(limits_of(options), options, replicas)
    known = getattr(torch, dtype, None)
    return replace(found, itemsize=known.itemsize) if isinstance(known, torch.dtype) else found


def require_ready(served: ServedModel, name: str) -> None:
    """Say so if the model does not run there yet: the first job then waits for it, or fails.

    Raises:
        Fault: no NDIF server answers.
    """
    served.server.greet()
    state = states(served)
    if not state.startswith("running"):
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
    for each in served.replicas():
        if each.get("actor_class"):
            split = ".tp." in each["actor_class"]
            said.add((each.get("dtype"), each.get("gpus") if split else 1))
    return dict(zip(("weights_in", "tensor_parallel"), said.pop(), strict=True)) if len(said) == 1 else {}


def greeted(served: ServedModel, ledger: Ledger, patience: float, watch: Watch = unwatched) -> dict[str, Any]:
    """Which model answers there: the greeting that `models.greeting` says, and `models.apart` compares with another.

    `watch` takes how the job stands, which may wait for the model to be loaded, or for others' jobs.

    Raises:
        Fault, Incomplete: as the server says, or does not say.
    """
    unit = first_unit(served.model.layout)
    jobs = JobsInFlight(served, ledger, 1, patience, lambda text: tell(f"{served.name}: {text}"))
    jobs.watch = watch
    found = only(jobs, unit)
    served.first_job = ledger[unit.label].job
    return greeting_of(found, deployed(served))


def jobs_in_flight(options: Options, model: Model, ledger: Ledger) -> JobsInFlight:
    """The backend for the options' hosts, of which one answers at least; several of them are known to be alike.

    Raises:
        Fault, SelfRepairError: as a host says, if none answers, or if they serve different things.
    """
    if len(options.hosts) > 1:
        return connected(options, model, ledger)[0]
    served = ServedModel(servers_of(options)[0], model)
    require_ready(served, model.name)
    return JobsInFlight(served, ledger, options.in_flight, options.patience, tell)


def connected(
    options: Options, model: Model, ledger: Ledger, watch: Watch = unwatched
) -> tuple[JobsInFlight, dict[str, Any]]:
    """The backend, once each host has answered and run the model, or is left out; and what is to be kept of them.

    That is dtype, what they compute in; server: address and versions of one, and of several, servers: those of each;
    and the greeting of the first. `watch` takes how the jobs stand, from the first on.

    Raises:
        Fault, Incomplete: as the hosts say, or do not say.
        SelfRepairError: they serve different things.
    """
    every = [ServedModel(server, model) for server in servers_of(options)]
    said = side_by_side({each.name: partial(introduced, each, ledger, options) for each in every}, watch)
    absent = {name: each for name, each in said.items() if isinstance(each, Fault | Incomplete)}
    found = {name: each for name, each in said.items() if not isinstance(each, Fault | Incomplete)}
    if not found:
        raise _of_all(absent)
    services = _each_once(every, options)
    first, *others = (found[each.name] for each in services if each.name in found)
    _require_alike(first, others)
    jobs = JobsInFlight(services, ledger, options.in_flight, options.patience, tell)
    jobs.watch = watch
    for served in services:
        served.expected = first
        if error := absent.get(served.name):
            _begin_without(jobs, served.name, error)
    facts = {"dtype": first["greeting"]["computes_in"], "server": _kept(first), "greeting": first["greeting"]}
    return jobs, facts | ({"servers": [*map(_kept, [first, *others])]} if len(services) > 1 else {})


def _each_once(every: Sequence[ServedModel], options: Options) -> list[ServedModel]:
    """Those that are not the server of one before them under another address, of which it is told.

    Of several none is waited for in one place: that would keep the others waiting.
    """
    services = list[ServedModel]()
    for served in every:
        served.server.patience = 0
        if twin := same_server(served, services):
            tell(
                f"{served.name} is left out: it is the server at {twin.name}, which knows its jobs; --in-flight says "
                "how many a server is given at a time"
            )
        else:
            services.append(served)
    for served in services if len(services) == 1 else []:
        served.server.patience = options.patience
    return services


def same_server(served: ServedModel, others: Iterable[ServedModel]) -> ServedModel | None:
    """The one of the others that knows the job in which this was greeted: the same server under another address."""
    for other in others:
        with suppress(Fault):
            if served.first_job and other.server.ask(served.first_job):
                return other
    return None


def _of_all(absent: Mapping[str, Fault | Incomplete]) -> Fault | Incomplete:
    """What is wrong where no host is left; of several, each is told of."""
    if len(absent) > 1:
        for name, error in absent.items():
            tell(f"{name}: {error}")
    return next(iter(absent.values()))


def _begin_without(jobs: JobsInFlight, name: str, error: Fault | Incomplete) -> None:
    refused = error if isinstance(error, Fault) and not KINDS[error.kind].passes else None
    jobs.hosts.without(name, jobs.clock(), refused)
    tell(f"{name} is left out{'' if refused else ' until it answers'}: {error}")


def introduced(served: ServedModel, ledger: Ledger, options: Options, watch: Watch) -> dict[str, Any]:
    """What a host is by its own words, and, with greeting, by a small job to the model, once it runs there."""
    require_ready(served, served.model.name)
    greeting = greeted(served, ledger, options.patience, watch)
    facts = served.facts()
    apart = [*versions_apart(facts)]
    _tell_apart(served.server, apart)
    return facts | {"greeting": greeting} | ({"apart": {name: said for name, said, _ in apart}} if apart else {})


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "greeting"}


def _require_alike(first: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    for other in others:
        if found := differences(first, other):
            raise SelfRepairError(
                f"{other['host']} serves something else than {first['host']}: {'; '.join(found)}. Numbers would depend "
                "on who computed them, so nothing more is sent: leave one of them out"
            )


def _tell_apart(server: Server, apart: list[tuple[str, str, int]]) -> None:
    """Tell of clocks; of versions, which doctor compares and the store keeps, only where more than usual is told."""
    if differing := [f"{name} {said}" for name, said, place in apart if place < 3]:
        LOG.info("%s has other versions (%s): modules and rounding may differ", server.host, ", ".join(differing))
    if clocks := clocks_apart(server.ahead):
        tell(f"the clock of {server.host} is {clocks}: set the one that is wrong; nothing here goes by it")


def traffic(ledger: Ledger) -> dict[str, int]:
    """Jobs sent for a store so far, and the bytes of their requests and results."""
    records = ledger.records.values()
    return {
        "jobs": sum(r.jobs for r in records),
        "bytes_sent": sum(r.bytes_sent for r in records),
        "bytes_returned": sum(r.bytes_returned for r in records),
    }
