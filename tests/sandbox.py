"""NDIF's own sandbox without its server: a session's block runs in another process, which has no weights.

A shared NDIF server hands every request to a fresh runner process. That process builds the model's structure on the
meta device, executes the block there, and asks the host, over a socket, for each activation and each module call.
Here the runner and the host's half of the conversation are the published package's (`ndif`, pinned in
requirements-sandbox.txt); what is left out is Ray, Redis and the object store around them.
"""

import io
import json
from unittest.mock import patch

import nnsight
import torch
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.driver import SandboxDriver
from ndif_server.inside.crossings import Crossings
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import save
from nnsight.tracing.util import push

from selfrepair_nn.tracing.session import run_session

START_SECONDS = 900


class Sandbox(Backend):
    """A runner for the model saved at `path` (with its tokenizer), and that model loaded here, as the server's host.

    `client` is the model as a user far from the server has it: structure only, no weights. `crossed` counts the bytes
    that the last job moved between its process and the model's, both ways, its code and its result left out.
    """

    def __init__(self, model, path: str) -> None:
        self.model, self.printed, self.crossed = model, [], 0
        model._module.requires_grad_(False)  # as the server does
        self.client = nnsight.TransformersModel(path, task="text-generation", tokenizer=path)
        key = {"repo_id": path, "revision": None, "task": "text-generation", "tokenizer": path}
        name = f"nnsight.modeling.transformers.TransformersModel:{json.dumps(key)}"
        with patch.object(host, "RUNNER_ENV", (*host.RUNNER_ENV, "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY")):
            self.runner = host.spawn(model_key=name, timeout=START_SECONDS)

    def run(self, job, arrays, plan):
        """The job's result, by the package's own `run_session`, sent here instead of to a server."""
        nnsight.register("selfrepair_nn")
        with patch.object(Remotable, "_remote_backend", lambda *_: self):
            return run_session(job, self.client, arrays, plan, remote=True)

    def __call__(self, tracer) -> None:
        """Ship the captured block to the runner, drive the model for it, bring back what it saved."""
        pull_env()
        blob = RequestModel.serialize(tracer, compress=True)
        dtype = next(self.model._module.parameters()).dtype
        connection = self.runner.connection()
        try:
            connection.send((blob, True, str(dtype), None, {}))
            crossings = Crossings(connection)
            data, _ = SandboxDriver(self.model, dtype, on_log=self.printed.append).pump(connection)
        finally:
            connection.close()
        self.crossed = crossings.bytes - len(data)
        found = torch.load(io.BytesIO(data), weights_only=False)
        for value in found.values():
            save(value)
        push(tracer.info.frame, found)

    def close(self) -> None:
        """Stop the runner."""
        self.runner.stop()
