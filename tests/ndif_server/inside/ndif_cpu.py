"""NDIF's model actors and controller for a machine without a GPU, through NDIF's own extension points.

NDIF_MODEL_IMPORT_PATH and NDIF_CONTROLLER_IMPORT_PATH name these classes. What they replace is where NDIF 0.1.2 takes
a CUDA device for granted; queueing, execution, sandbox, results, errors and time limits stay its own. The GPU that its
controller assigns is a number that Ray counts, never a device.
"""

import gc
import json
import os
import subprocess
import time
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import ray
from crossings import noted
from ndif.common.schema.controller import DeploymentConfig
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import KILL_REASON_PREEMPTED, BaseModelDeployment
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.driver import SandboxDriver
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import Remotable
from runners import Forked

host.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": Forked})
"""A sandbox's process is a fork of one that has imported all: otherwise every request waits for seconds of imports."""

host.RUNNER_ENV += ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY")
"""A sandbox's process inherits these names only, and it must find our hub; the token for weights is not among them."""

PATIENCE = 180
host.spawn = partial(host.spawn, timeout=PATIENCE)
host.Pool.acquire = partialmethod(host.Pool.acquire, timeout=PATIENCE)
"""A busy machine can need more than NDIF's half minute to start a sandbox's process."""

SandboxDriver.pump = partialmethod(noted, SandboxDriver.pump, os.environ["NDIF_CROSSED"])


class CPUDeployment(BaseModelDeployment):
    """One model in host memory.

    NDIF_SLOW holds, as JSON, how long some take at least: {model key: seconds for each sequence of a pass}. In the
    directory NDIF_ACTORS a file by the name of each actor's process id holds its model's key.
    """

    def __init__(self, *args, gpu_mem_bytes_by_id=None, **kwargs):
        super().__init__(*args, gpu_mem_bytes_by_id=None, **kwargs)

    def load_from_disk(self):
        Path(os.environ["NDIF_ACTORS"], str(os.getpid())).write_text(self.model_key)
        options = {"dispatch": True, "dtype": self.dtype_name, "device": "cpu", **self.kwargs}
        model = HuggingFaceModel.from_model_key(self.model_key, **options)
        model._module.requires_grad_(False)
        if seconds := json.loads(os.environ["NDIF_SLOW"]).get(self.model_key):
            embedding = model._module.get_input_embeddings()
            embedding.register_forward_pre_hook(lambda _, inputs: time.sleep(seconds * len(inputs[0])))
        return model

    async def to_cache(self):
        await self.cancel(KILL_REASON_PREEMPTED)
        self.cached = True

    def from_cache(self, gpu_mem_bytes_by_id):
        self.cached = False

    def cleanup(self):
        self.kill_switch.clear()
        self.kill_reason = self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


class CPUSandboxDeployment(SandboxModelDeployment, CPUDeployment):
    """The same; requests of keys that are not trusted run in a process of their own, which has no weights."""


def _take_and_drop_trust_remote_code(name: str) -> None:
    """NDIF 0.1.2 passes nnsight a keyword that nnsight 0.8.1 has moved into the model's key."""
    original = getattr(Remotable, name)

    def tolerant(cls, *args, trust_remote_code=False, **kwargs):
        return original.__func__(cls, *args, **kwargs)

    setattr(Remotable, name, classmethod(tolerant))


class CPUController(_ControllerActor):
    """NDIF_SPECIAL holds, as JSON, what differs for single models: {model key: {field of DeploymentConfig: value}}."""

    def __init__(self, *args, **kwargs):
        for name in ("describe_checkpoint", "max_tp_size"):
            _take_and_drop_trust_remote_code(name)
        super().__init__(*args, **kwargs)

    def _deploy(self, deployments):
        special = json.loads(os.environ["NDIF_SPECIAL"])
        configs = DeploymentConfig.normalize(deployments)
        return super()._deploy({k: c.model_copy(update=special.get(k, {})) for k, c in configs.items()})


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUModelActor(CPUDeployment):
    pass


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUSandboxModelActor(CPUSandboxDeployment):
    pass


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class CPUControllerActor(CPUController):
    pass
