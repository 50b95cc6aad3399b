"""One of the processes that a model is split among: it runs jobs by nnsight's own session, and keeps their results.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=… python two_ranks.py FOLDER

`FOLDER/asked.pt` holds {directory of a model: [(job, arrays, plan)]}; `FOLDER/given-RANK.pt` will hold the results of
each.
The processes talk by gloo, which a server's would do by NCCL.
"""

import os
import sys
from pathlib import Path

import nnsight
import torch
import torch.distributed
from transformers import AutoTokenizer
from transformers.distributed import DistributedConfig, parallel_utils, tensor_parallel

from selfrepair_nn.tracing.session import run_session

if not hasattr(
    tensor_parallel, "_get_parameter_plan"
):  # nnsight 0.8.1 looks where it was until transformers 5.22
    tensor_parallel._get_parameter_plan = parallel_utils._get_parameter_plan


def loaded(path):
    """A model, this process's part of it, as NDIF loads it; and how many of its parameters are split."""
    config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    model = nnsight.TransformersModel(
        path,
        task="text-generation",
        tokenizer=AutoTokenizer.from_pretrained(path),
        distributed_config=config,
        dispatch=True,
    )
    return model, sum(hasattr(each, "full_tensor") for each in model._module.parameters())


def main(folder):
    found = {}
    for path, asked in torch.load(folder / "asked.pt", weights_only=False).items():
        model, split = loaded(path)
        results = [run_session(job, model, arrays, plan) for job, arrays, plan in asked]
        found[path] = {"split": split, "results": results}
    torch.save(found, folder / f"given-{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
