"""How jobs stand, in words: starting cold, queued and at which place, running and for how long."""

import re
from collections.abc import Iterable

from selfrepair_nn.backends.ndif.agreement import duration
from selfrepair_nn.backends.ndif.faults import brief
from selfrepair_nn.backends.ndif.hosts import Host, Hosts
from selfrepair_nn.backends.ndif.pieces import Piece

WORDS = {
    "": "sent",
    "RECEIVED": "received",
    "QUEUED": "queued",
    "PROVISIONING": "cold start: a place for the model is being found",
    "DEPLOYING": "cold start: the model is being loaded",
    "DISPATCHED": "handed to the model",
    "RUNNING": "running",
    "COMPLETED": "finished",
    "ERROR": "failed",
}
PLACE = re.compile(r"position (\d+)", re.IGNORECASE)


def in_words(status: str, description: str) -> str:
    """What a server says of a job: "queued at place 3"; of a status that is not known, what it says itself."""
    place = PLACE.search(description)
    if status == "QUEUED" and place:
        return f"queued at place {place[1]}"
    return WORDS.get(status) or f"{status.lower()} ({brief(description)})"


def standing(flying: Iterable[Piece], hosts: Hosts, now: float) -> str:
    """Of each status how many jobs have it and for how long the first of them has, for each host."""
    every = [*flying]
    told = [(host, _of_host(host, [piece for piece in every if piece.host is host], now)) for host in hosts]
    return "; ".join(f"{host.name}: {said}" if hosts.several else said for host, said in told if said)


def _of_host(host: Host, flying: list[Piece], now: float) -> str:
    if host.refused or host.silent is not None:
        return "left out" if host.refused else f"silent for {duration(now - (host.silent or now))}"
    found = dict[str, list[Piece]]()
    for piece in sorted(flying, key=lambda piece: piece.heard):
        status, _, description = piece.status.partition(": ")
        found.setdefault(in_words(status, description), []).append(piece)
    return ", ".join(f"{len(each)} {said} for {duration(now - each[0].heard)}" for said, each in found.items())
