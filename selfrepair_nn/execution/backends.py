"""Where a job runs. Every backend takes the same job, arrays and plan, and gives the same dict of tensors."""

from collections.abc import Callable
from typing import Any

from selfrepair_nn.models.load import Model
from selfrepair_nn.options import BACKENDS, one_of

Job = Callable[..., dict]
Backend = Callable[[Job, dict, dict, Callable[[int], None] | None], dict[str, Any]]


def backend(name: str, model: Model) -> Backend:
    """A function (job, arrays, plan, tick) -> result for a backend's name; `tick` is only called by local ones.

    Raises:
        UsageError: no backend of that name.
    """
    one_of("backend", name, BACKENDS)
    if name == "simulated":
        import nnsight

        nnsight.register("selfrepair_nn")
    remote = "local" if name == "simulated" else False

    def run(job: Job, arrays: dict, plan: dict, tick: Callable[[int], None] | None = None) -> dict[str, Any]:
        from selfrepair_nn.tracing.session import run_session

        return run_session(job, model.nn, arrays, plan, tick, remote)

    return run
