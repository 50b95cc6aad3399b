"""What an NDIF server lets a job take: as the hosted service does, as was chosen, or as the server tells."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from selfrepair_nn.options import Options

MIB = 2**20
ITEMSIZE = 2
"""Bytes of a number where it is not known what a server computes in."""


@dataclass(frozen=True)
class Limits:
    """The limits of one server.

    Args:
        seconds: after which a job is ended. The hosted service's: NDIF documents 3600 (`execution_timeout_seconds` in
            ndif.cli.lib.model_config, the default of NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS before 0.1). A server of
            one's own that sets neither ends no job (ndif 0.1.2).
        kept_hours: for which the hosted service keeps a result.
        link_hours: for which the address of a result is valid (ndif.common.providers.objectstore.presigned_get).
        inline_bytes: of a compressed result that comes within the answer, where a client waits for it; larger ones lie
            in the object store (ndif.common.providers.redis, `max_publish_bytes` of a stock Redis).
        degree: processes that each layer is split among. In a sandbox each of them sends every value that is read, and
            is sent it back (ndif.services.ray.sandbox.protocol.Fanout).
        sandboxed: whether jobs run in a process of their own, without weights; None where that is not known.
        itemsize: bytes of a number there, as it crosses into a sandbox: most servers compute in bfloat16.
    """

    seconds: float = 3600.0
    kept_hours: float = 24.0
    link_hours: float = 1.0
    inline_bytes: int = 8 * MIB
    degree: int = 1
    sandboxed: bool | None = None
    itemsize: int = ITEMSIZE


def limits_of(options: Options) -> Limits:
    """The limits before the server was asked: as chosen, else the hosted service's, which runs jobs in a sandbox."""
    chosen = {"seconds": options.job_seconds, "degree": options.tensor_parallel}
    known = {name: value for name, value in chosen.items() if value is not None}
    return Limits(sandboxed=None if options.host else True, **known)


def told(limits: Limits, options: Options, replicas: Iterable[Mapping[str, Any]]) -> Limits:
    """The same with what the server's status says of the replicas of a model, where that was not chosen.

    These are `execution_timeout_seconds`, where a deployment has its own; `actor_class`, the name of what runs jobs;
    and `gpus`, which is the degree where that splits layers (ndif.services.ray.deployments.controller, `status`).
    """
    found: dict[str, Any] = {}
    each = list(replicas)
    actors = [str(r["actor_class"]).rpartition(".")[2] for r in each if r.get("actor_class")]
    seconds = _positive(r.get("execution_timeout_seconds") for r in each)
    split = _positive(r.get("gpus") for r in each if "TP" in str(r.get("actor_class")))
    if seconds and options.job_seconds is None:
        found["seconds"] = min(seconds)
    if split and options.tensor_parallel is None:
        found["degree"] = round(max(split))
    if actors and not any("sandbox" in name.lower() for name in actors):
        found["sandboxed"] = False
    return replace(limits, **found)


def _positive(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if isinstance(value, int | float) and value > 0]
