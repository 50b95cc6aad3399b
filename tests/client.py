"""A client of an NDIF server, in a process of its own: nnsight and huggingface_hub read their settings once, at import.

usage: python client.py REQUESTS REPLIES    (both written by torch.save; see `ask`)
"""

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import torch

PATIENCE = 600
TESTS = Path(__file__).parent


def ask(server, requests, folder):
    """Run ablation jobs on a server. Each request is {"model": hub name, "arrays": …, "graph": Graph's arguments}.

    Each reply is {"found": the job's result, "devices": what holds the client's parameters, "sent", "returned": bytes,
    "seconds": a round trip}.
    """
    asked, answered = folder / "requests.pt", folder / "replies.pt"
    torch.save(requests, asked)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(asked), str(answered)],
        env=os.environ | server.env | {"PYTHONPATH": str(TESTS.parent)},
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


def _answer(model, arrays, graph):
    from unittest.mock import patch

    import nnsight
    from nnsight.intervention.backends.remote import RemoteBackend

    from selfrepair_nn.tracing.jobs import ablation_job
    from selfrepair_nn.tracing.session import run_session

    nnsight.register("selfrepair_nn")
    far, layout = far_model(model)
    counted = {}
    post, finalize = RemoteBackend._post, RemoteBackend.finalize

    def posting(self, request, blob):
        counted["sent"] = len(blob)
        return post(self, request, blob)

    def finalizing(self, content):
        counted["returned"] = len(content)
        return finalize(self, content)

    began = time.perf_counter()
    with patch.multiple(RemoteBackend, _post=posting, finalize=finalizing):
        found = run_session(ablation_job, far, arrays, planned(layout, graph), remote=True)
    seconds = time.perf_counter() - began
    devices = sorted({parameter.device.type for parameter in far._module.parameters()})
    return {"found": found, "devices": devices, "seconds": seconds, **counted}


if __name__ == "__main__":
    torch.save([_answer(**request) for request in torch.load(sys.argv[1])], sys.argv[2])
