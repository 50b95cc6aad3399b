"""What is probed of the weights is probed once a run, whatever asks for it, and the numbers are the same."""

import families
import pytest
import torch
from numpy.testing import assert_array_equal

import selfrepair_nn as sr
from selfrepair_nn.components import FinalNorm, Head, Mlp, Neuron, Norm
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.tracing.jobs import ablation_job, effects_job
from selfrepair_nn.tracing.probes import Weights
from selfrepair_nn.tracing.session import run_session

GRAPHS = {
    "one layer": Graph(ablate=sweep([Head(2, 0)])),
    "lower layers too": Graph(ablate=sweep([Head(0, 1), Head(2, 1)]), value_bias="head"),
    "everything": Graph(ablate=sweep([Head(1, 1), Mlp(0)]), record="full", target="raw"),
    "neurons": Graph(ablate=((Neuron(1, 3), Head(2, 2)),), neurons=2),
    "frozen": Graph(ablate=sweep([Head(1, 0)]), freeze=frozenset({Norm(2, "attention"), Norm(2, "mlp"), FinalNorm()})),
    "a difference": Graph(ablate=sweep([Head(1, 2)]), target="difference"),
    "zero": Graph(ablate=sweep([Head(1, 2)]), replacement="zero"),
}


def probing_calls(module):
    """A list that grows with each vector that is put through the unembedding by itself, and not in a pass."""
    calls = []
    module.get_output_embeddings().register_forward_hook(
        lambda module, args, output: calls.append(len(args[0])) if args[0].ndim == 2 else None
    )
    return calls


@pytest.mark.parametrize("vocabulary", [None, range(50)], ids=["unknown", "known"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2"])
def test_what_is_known_gives_the_same_numbers(wrapped, seeded, name, vocabulary):
    """Each job after others that asked for less, for more, or for the same in another convention."""
    model, known = wrapped(name), Weights(None if vocabulary is None else torch.tensor(vocabulary))
    graphs = [g for g in GRAPHS.values() if name != "gemma2" or g.neurons is None]
    for turn, graph in enumerate(graphs + graphs[::-1]):
        tokens = torch.as_tensor(seeded(name, seed=turn % 3))
        arrays = {"tokens": tokens, "partner_tokens": tokens.roll(1, 0), "other": tokens.roll(2, 0)[:, 1:].contiguous()}
        plan = graph.plan(model.layout) | {"tokens_per_pass": 100}
        for job in (ablation_job, effects_job):
            fresh = run_session(job, model.nn, arrays, plan)
            again = run_session(job, model.nn, arrays, plan, known=known)
            for each in fresh:
                assert_array_equal(fresh[each], again[each], err_msg=each)


def test_the_unembedding_is_read_once_a_run(tmp_path):
    """However many blocks there are; for the noise floor and for what chooses top tokens too."""
    counts = []
    for block in (1, 4):
        module = families.build("gpt2").float()
        calls = probing_calls(module)
        sr.run(
            model=module,
            prompts=families.random_ids(module, 8, 6),
            batch_size=block,
            select="top-share",
            share=0.5,
            check=False,
            progress=False,
            out=tmp_path / f"{block}.zarr",
        )
        counts.append(sum(calls))
    of_greeting = 2  # the store's first: whose weights these are
    assert counts[0] == counts[1] == 1 + module.config.hidden_size + of_greeting


def test_short_memory_forgets_what_was_found(wrapped, tmp_path, monkeypatch):
    from selfrepair_nn.backends import local

    model, seen = wrapped("gpt2"), []
    runner = local.backend("local", model)

    def job(model, arrays, plan, tick=None, known=None):
        seen.append(known)
        if len(seen) == 1:
            raise MemoryError
        return {"x": arrays["tokens"][:, :1].float()}

    tokens = torch.arange(8).unflatten(0, (2, 4))
    plan = {"tokens_per_pass": 64}
    unit = Unit("u", job, slice(0, 2), plan, lambda part: {"tokens": tokens[part]}, {"x": ("prompt", 1)})
    monkeypatch.setattr(local, "tell", lambda text: None)
    ((_, found),) = runner([unit])
    assert found["x"].tolist() == [[0], [4]]  # from its halves
    assert seen[0] is not seen[1]
    assert isinstance(seen[1], Weights)
