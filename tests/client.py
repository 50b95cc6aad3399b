"""A client of an NDIF server, in a process of its own: nnsight and huggingface_hub read their settings once, at import.

usage: python client.py REQUESTS REPLIES    (both written by torch.save; see `ask`)
"""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch

PATIENCE = 600
TESTS = Path(__file__).parent


def ask(env, requests, folder):
    """Run jobs on the server that `env` tells a client of.

    Each request is {"model": hub name, "arrays": …, "graph": Graph's arguments}; without a graph it asks where it runs.
    Each reply is {"found": the job's result, "devices": where the client's parameters are, "sent", "returned": bytes,
    "seconds": a round trip}.
    """
    asked, answered = folder / "requests.pt", folder / "replies.pt"
    torch.save(requests, asked)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(asked), str(answered)],
        env=os.environ | env | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(answered)


def planned(layout, graph, rows=768):
    """Every head by itself, several to a pass, as a job's plan."""
    from selfrepair_nn.components import select_heads
    from selfrepair_nn.graph import Graph, sweep

    graph = dict(graph)
    heads = select_heads(graph.pop("layers", None), None, layout["n_layers"], layout["n_heads"])
    return Graph(ablate=sweep(heads), **graph).plan(layout) | {"rows": rows}


@cache
def far_model(name):
    """A model's structure, without weights, and its layout."""
    from dataclasses import asdict

    import nnsight

    from selfrepair_nn.models.architectures import structure_of

    model = nnsight.TransformersModel(name, task="text-generation", tokenizer=name)
    return model, asdict(structure_of(model._module))


def look_around(model, arrays, plan):
    """A job that tells where the parameters are that it could reach."""
    return {"devices": sorted({parameter.device.type for parameter in model._module.parameters()})}


def _answer(model, arrays=None, graph=None):
    import nnsight

    from selfrepair_nn.tracing.jobs import ablation_job
    from selfrepair_nn.tracing.session import run_session

    nnsight.register("selfrepair_nn")
    far, layout = far_model(model)
    job, plan = (ablation_job, planned(layout, graph)) if graph else (look_around, {})
    began = time.perf_counter()
    with _counted() as counted:
        found = run_session(job, far, arrays, plan, remote=True)
    seconds = time.perf_counter() - began
    return {"found": found, "devices": look_around(far, None, None)["devices"], "seconds": seconds, **counted}


@contextmanager
def _counted():
    """Bytes of the request's and of the result's blob, in the dict that it gives."""
    from nnsight.intervention.backends.remote import RemoteBackend

    counted = {}
    post, finalize = RemoteBackend._post, RemoteBackend.finalize

    def posting(self, request, blob):
        counted["sent"] = len(blob)
        return post(self, request, blob)

    def finalizing(self, content):
        counted["returned"] = len(content)
        return finalize(self, content)

    with patch.multiple(RemoteBackend, _post=posting, finalize=finalizing):
        yield counted


if __name__ == "__main__":
    torch.save([_answer(**request) for request in torch.load(sys.argv[1])], sys.argv[2])
