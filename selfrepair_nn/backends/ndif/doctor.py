"""What may be wrong with this machine, its settings and a server: looked at, and said in a line each."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfrepair_nn import provenance
from selfrepair_nn.backends.ndif.agreement import COMPARED, clocks_apart, differences, versions_apart
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.errors import Incomplete, SelfRepairError
from selfrepair_nn.secrets import PROXIES, hub_token, ndif_key
from selfrepair_nn.settings import hub_fault, ndif_fault, proxy_faults

SETTINGS = (
    "NDIF_HOST",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    *PROXIES,
)
PATIENCE = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was seen, and whether it is right (None: neither right nor wrong)."""

    what: str
    seen: str
    right: bool | None = None


@dataclass
class _Known:
    """What hosts have said so far, {host: facts}, and the model on each of them that was sent a job."""

    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    greeted: list[Any] = field(default_factory=list)


def doctor(
    host: str | Iterable[str] | None = None, *, remote: bool = False, model: str | None = None, trip: bool = False
) -> Iterator[Finding]:
    """Look at this machine and its settings; and at a server, if one is named or NDIF_HOST is set.

    Args:
        host: the server's address; or those of several, which are compared too.
        remote: look at the server that nnsight is configured for.
        model: a model whose state on the server is asked for.
        trip: also send it the smallest of jobs, which tells whose weights answer.

    A setting is only ever said to be set or not. Nothing raises: what fails is a finding.
    """
    yield from _here()
    from selfrepair_nn.options import Options

    if host or remote or os.environ.get("NDIF_HOST"):
        try:
            hosts = Options(remote=True, host=host).hosts
        except SelfRepairError as error:
            yield Finding("server", str(error), False)
            return
        yield from _each(hosts, model, trip)
    else:
        yield Finding("server", "not asked: name one with --host, or NDIF's own with --remote")


def _here() -> Iterator[Finding]:
    import torch

    yield Finding("versions", ", ".join(f"{name} {v}" for name, v in provenance.versions().items()))
    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    yield Finding("device", device)
    yield _usable("NDIF key", _set(ndif_key()), ndif_fault())
    yield _usable("HF_TOKEN", _set(hub_token()), hub_fault())
    yield Finding("settings", ", ".join(f"{name} {_set(_setting(name))}" for name in SETTINGS))
    yield from (Finding("proxy", fault, False) for fault in proxy_faults())


def _each(hosts: Sequence[str | None], model: str | None, trip: bool) -> Iterator[Finding]:
    """Every host in turn; what is found of several bears their names, and they are compared."""
    known = _Known()
    for host in hosts:
        for found in _asked_all(host, model, trip, known):
            yield found if len(hosts) == 1 else replace(found, seen=f"{host}: {found.seen}")
    yield from _twins(known.greeted)
    first, *others = known.said.values() or [{}]
    for other in others:
        found = "; ".join(differences(first, other))
        agree = f"{other['host']} is as {first['host']}"
        seen = f"{other['host']} differs from {first['host']}: {found}" if found else agree
        yield Finding("hosts", seen, not found)


def _twins(greeted: Sequence[Any]) -> Iterator[Finding]:
    """Those that are the server of one before them under another address."""
    from selfrepair_nn.backends.ndif.served import same_server

    for index, served in enumerate(greeted):
        if twin := same_server(served, greeted[:index]):
            yield Finding("hosts", f"{served.name} is the server at {twin.name}: name each server once")


def _asked_all(host: str | None, model: str | None, trip: bool, known: _Known) -> Iterator[Finding]:
    """All there is to be found of a host; where it fails, that."""
    try:
        yield from _there(host, model, trip, known)
    except (SelfRepairError, Incomplete) as error:
        yield Finding("server", str(error), False)


def _there(host: str | None, model: str | None, trip: bool, known: _Known) -> Iterator[Finding]:
    from selfrepair_nn.backends.ndif.server import Server

    server = Server(host, patience=PATIENCE)
    server.greet()
    yield Finding("server", f"{server.host} answers", True)
    yield _clock(server.ahead)
    try:
        versions = server.environment()
        known.said[server.host] = {"host": server.host} | {n: versions[n] for n in COMPARED if n in versions}
        yield from _compared(versions)
        yield Finding("models", _models(server.status()))
    except Fault as fault:
        yield Finding("cluster", str(fault), False)
    if model:
        yield from _asked_for(server, model, trip, known)
    elif trip:
        yield Finding("round trip", "say which model with --model", False)


def _compared(there: dict[str, str]) -> Iterator[Finding]:
    """Each version that should be the same. What differs in the third place is allowed, and said."""
    differing = {name: (said, place) for name, said, place in versions_apart(there)}
    for name in COMPARED:
        said, place = differing.get(name, (f"{there.get(name, 'unknown')} there", 0))
        if place > 2:
            yield Finding(name, f"{said}: they differ in the third place, which is allowed", True)
        elif place:
            yield Finding(name, f"{said}: modules and rounding may differ; best have the same here", None)
        else:
            yield Finding(name, said, True if name in there else None)


def _clock(ahead: float | None) -> Finding:
    if found := clocks_apart(ahead):
        return Finding("clock", f"the server's is {found}: set the one that is wrong", None)
    return Finding("clock", "not said" if ahead is None else "the same there, to a minute", ahead is not None or None)


def _models(replicas: list[dict]) -> str:
    known = [r for r in replicas if r.get("application_state")]
    said = {f"{r.get('repo_id')} {r['application_state'].lower()} ({r.get('dtype')})" for r in known}
    return ", ".join(sorted(said)) or "none is deployed"


def _asked_for(server, name: str, trip: bool, known: _Known) -> Iterator[Finding]:
    from selfrepair_nn.backends.ndif.served import ServedModel, states
    from selfrepair_nn.models.load import describe, load_tokenizer, structure_only

    description = describe(name)
    served = ServedModel(server, structure_only(description, load_tokenizer(description.source)))
    found = states(served)
    yield Finding("model", f"{name} is {found}", True if found.startswith("running") else None)
    known.said[server.host] = served.facts()
    if trip:
        yield from _greeted(served, known)


def _greeted(served, known: _Known) -> Iterator[Finding]:
    """A job to the model and back, and which model it found there."""
    from selfrepair_nn.backends.ndif.ledger import Ledger
    from selfrepair_nn.backends.ndif.served import greeted
    from selfrepair_nn.models.greeting import attention_said, fingerprint_of, split_said, weights_said

    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = greeted(served, Ledger(Path(folder) / "jobs.jsonl", "trip"), PATIENCE)
        seconds = time.perf_counter() - began
    known.said[served.name]["greeting"] = found
    known.greeted.append(served)
    took = f"{seconds:.2f} s, little more than for one token"
    yield Finding("round trip", f"{took}; it computes in {found['computes_in']}", True)
    yield Finding("weights", f"{weights_said(found)}, fingerprint {fingerprint_of(found)}")
    yield Finding("attention", attention_said(found))
    yield Finding("split", split_said(found))


def _usable(what: str, seen: str, fault: str | None) -> Finding:
    return Finding(what, fault or seen, False if fault else None)


def _setting(name: str) -> str | None:
    """Proxies are named in small letters too."""
    return os.environ.get(name) or (os.environ.get(name.lower()) if name in PROXIES else None)


def _set(value: str | None) -> str:
    return "set" if value else "not set"
