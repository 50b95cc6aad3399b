"""Running one job: the same single line for a model in this process, a simulated server and a real one."""

from nnsight import save

from selfrepair_nn.tracing.cases import realised
from selfrepair_nn.tracing.readouts import to_cpu


def run_session(job, model, arrays, plan, tick=None, remote=False, known=None):
    """The result of `job(model, arrays, plan)` run as one nnsight session, on the CPU.

    `remote=False` runs it in this process; "local" ships the code and the arrays by value, as to a server, and runs
    them here. `tick` and `known` cannot travel and are only passed on in this process.
    """
    if not remote:
        return to_cpu(run_here(job, model, arrays, plan, tick, known))
    plan = realised(plan)
    with model.session(remote=remote):
        result = save(to_cpu(job(model, arrays, plan)))
    return result


def run_here(job, model, arrays, plan, tick=None, known=None):
    """The same in this process, where the result came to be: a GPU may still be computing it."""
    plan, more = realised(plan), {} if known is None else {"known": known}
    with model.session():
        result = save(job(model, arrays, plan, tick, **more))
    return result


def hand_over(job, model, arrays, plan, asked, backend):
    """Give the same session, unrun, to an nnsight backend. What it saves is called `RESULT` there.

    Its result holds `asked`, what it is the result of, as `ASKED`.
    """
    plan = realised(plan)
    with model.session(backend=backend):
        result = save({**to_cpu(job(model, arrays, plan)), "asked": asked})  # noqa: F841 - the name of what comes back


RESULT, ASKED = "result", "asked"
