"""Hosts that split each layer among processes: the numbers are those of one process, and no split embedding is read."""

import os
import subprocess
import sys
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import families
import further
import pytest
import torch
from ndif_server.server import free_ports
from nnsight import Envoy, save
from nnsight.intervention.interleaver import Mediator
from nnsight.modeling.tp import SIDES
from test_sandbox import RELATIVE, save_with_tokenizer
from transformers import AutoConfig

from selfrepair_nn.components import FinalNorm, Head, Layers, Mlp, Neuron, Norm, Routing, select_heads
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.greeting import first_unit
from selfrepair_nn.models.apart import compared
from selfrepair_nn.models.architectures import ARCHITECTURES
from selfrepair_nn.models.greeting import greeting_of
from selfrepair_nn.models.load import load
from selfrepair_nn.replacements import OtherHead, Reinforce
from selfrepair_nn.tracing import clean, terms
from selfrepair_nn.tracing.jobs import ablation_job, effects_job, lengths_job, mean_job
from selfrepair_nn.tracing.noise import noise_job
from selfrepair_nn.tracing.session import run_session

TWO_RANKS = Path(__file__).with_name("two_ranks.py")
SECONDS = 900
SPLIT = partial(further._made, "Mixtral", **further._EXPERTS, intermediate_size=64)
"""A mixture whose experts still multiply in steps of 16 bytes when they are halved."""


def graphs(structure):
    """Sites, replacements, records and frozen parts of every kind, on all layers."""
    heads = sweep(select_heads(None, None, structure.n_layers, structure.n_heads))
    frozen = {Head(1, 0), Mlp(1), Norm(2, "attention"), Norm(2, "mlp"), FinalNorm()}
    found = [
        Graph(heads, record="full", attention=(0, 1)),
        Graph(heads, "zero", freeze={site for site in frozen if site.lies_in(structure)}),
        Graph(heads[:2], Reinforce(2.0)),
        Graph(heads[:2], OtherHead(Head(1, 1)), words=2),
        Graph(((Head(0, 1), Mlp(0)), (Mlp(1),)), residual_norm=True),
        Graph(sweep([Layers(0, 1), Layers(1, 3)]), "zero"),
    ]
    if structure.routed:
        return [
            *found,
            Graph(heads, also="routing"),
            Graph(heads, also="routing", freeze={*map(Routing, structure.routed)}),
        ]
    neurons = Graph(((Neuron(0, 3), Head(1, 0)), (Neuron(1, 2),)), neurons=1)
    return [*found, neurons] if structure.d_mlp else found


def asked_of(model):
    """What both are asked: (job, arrays, plan), of the greeting and of each graph."""
    ids = torch.as_tensor(families.random_ids(model.module))
    arrays = {"tokens": ids, "partner_tokens": ids.roll(1, 0), "edited_position": torch.tensor([1, 3, 0, 5])}
    plans = [graph.plan(model.layout) | {"tokens_per_pass": 64} for graph in graphs(model.structure)]
    unit = first_unit(model.layout)
    return [(unit.job, unit.arrays, unit.plan), *((ablation_job, arrays, plan) for plan in plans)]


def in_two_processes(folder):
    """Run what `folder` asks for; the hashes of the two differ, so that none may follow the order of a set."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, TWO_RANKS, folder],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONHASHSEED": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        told = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], told
    return [torch.load(folder / f"given-{rank}.pt") for rank in "01"]


def assert_greeted_alike(split, whole):
    """The same weights, whose layers are known to be split; and so they are where that hides behind a sandbox."""
    split, whole = greeting_of(split), greeting_of(whole)
    assert (split["tensor_parallel"], whole["tensor_parallel"]) == (2, 1)
    found = compared(whole, split)
    assert (found.kind, found.differences) == ("same", [])
    assert "tensor parallelism is 1 there, 2 here" in found.notes


@pytest.mark.slow
def test_split_among_two_processes_numbers_are_the_same(tmp_path, monkeypatch):
    """Llama and a mixture of experts, halved over gloo: each process gives what one alone does."""
    monkeypatch.setitem(further.MODELS, "mixtral", SPLIT)
    asked, expected = {}, {}
    for name in ("llama-gqa", "mixtral"):
        path = str(tmp_path / name)
        save_with_tokenizer(name, path)
        model = load(path, check=False)
        asked[path] = asked_of(model)
        expected[path] = [run_session(job, model.nn, *given) for job, *given in asked[path]]
    torch.save(asked, tmp_path / "asked.pt")
    for given in in_two_processes(tmp_path):
        for path, here in expected.items():
            assert given[path]["split"] >= 3 * 6
            assert_greeted_alike(given[path]["results"][0], here[0])
            for one, other in zip(given[path]["results"][1:], here[1:], strict=True):
                assert one.keys() == other.keys()
                assert other["logit_change"].abs().mean() > 1e-2
                for name, values in other.items():
                    apart = (one[name] - values).abs().max()
                    assert apart <= RELATIVE * values.abs().max(), (path, name)


@pytest.mark.parametrize("name", ["llama-gqa", "neox-parallel", "mixtral", "gpt2"])
def test_an_embedding_is_read_only_where_there_are_two(wrapped, monkeypatch, name):
    """A token embedding may be split by vocabulary; without learned positions the first layer's input is it."""
    model, places = wrapped(name), []
    place = clean.place

    def watched(model, plan, what):
        places.append(what)
        return place(model, plan, what)

    for module in (clean, terms):
        monkeypatch.setattr(module, "place", watched)
    for job, arrays, plan in asked_of(model)[1:2]:
        run_session(job, model.nn, arrays, plan)
    assert "layers" in places
    assert ("token_embedding" in places) == model.structure.position_embedding == (name == "gpt2")


class Guard:
    """Where a model would be split, by the plan that transformers publishes of it: forbids what would be a piece there.

    A module of the plan may be read on a side that nnsight makes whole, or that is whole; a vocabulary-split embedding
    not at all, nor what lies between a projection that is split and the one that adds the pieces up.
    """

    def __init__(self, model):
        self.module, self.seen = model.module, set()
        config, base = model.module.config, model.module.base_model_prefix
        plan = {f"{base}.{path}": style for path, style in config.base_model_tp_plan.items()} | model.module._tp_plan
        plan |= {model.structure.places["token_embedding"]: "embedding_rowwise"}
        names = [name for name, _ in self.module.named_modules()]
        self.styles = {name: style for pattern, style in plan.items() for name in names if fnmatch(name, pattern)}
        apart = {name for name, style in self.styles.items() if style in ("colwise", "packed_colwise")}
        self.inside = {name.rpartition(".")[0] for name in apart}

    def look(self, location):
        path, _, side = location.removeprefix("model.").rpartition(".")
        self.seen.add((path, side))
        style = self.styles.get(path)
        assert style != "embedding_rowwise", f"{location} is one process's part of the vocabulary"
        assert style is None or style in SIDES, f"{location} is split in a way that nnsight does not undo: {style}"
        assert style or path.rpartition(".")[0] not in self.inside, f"{location} is a piece"

    @contextmanager
    def __call__(self, monkeypatch):
        event, call = Mediator.event.__func__, Envoy.__call__

        def watched(cls, kind, location, *rest):
            if location and location.rpartition(".")[2] in ("input", "output"):
                self.look(location)
            return event(cls, kind, location, *rest)

        def called(envoy, *args, **kwargs):
            self.look(f"{envoy.path}.call")
            return call(envoy, *args, **kwargs)

        def opened(envoy):
            raise AssertionError(f"{envoy.path}.source shows pieces")

        with monkeypatch.context() as patched:
            patched.setattr(Mediator, "event", classmethod(watched))
            patched.setattr(Envoy, "__call__", called)
            patched.setattr(Envoy, "source", property(opened))
            yield self


SPLITTABLE = ["llama-gqa", "neox-parallel", "mixtral", "phi3", "olmo2", "glm4", "cohere", "qwen3-moe"]


@pytest.mark.parametrize("name", SPLITTABLE)
def test_no_job_reads_a_piece(wrapped, monkeypatch, name):
    """On versions that cannot run two processes, too: of every kind of job, each read and each call of a module."""
    model = wrapped(name)
    asked, arrays = asked_of(model), asked_of(model)[1][1]
    layout, last = model.layout, model.structure.n_layers - 1
    total = Graph(sweep([Head(0, 0), Head(last, 0)]), "identity", record="total").plan(layout) | {"tokens_per_pass": 64}
    asked += [(job, arrays, total) for job in (noise_job, effects_job)]
    keep = {"model": layout, "keep": {"z": [0, last], "mlp": [last]}, "lengths": [1, 3]}
    asked += [(job, arrays, keep) for job in (mean_job, lengths_job)]
    with Guard(model)(monkeypatch) as guard:
        for job, *given in asked:
            run_session(job, model.nn, *given)
    ends = {model.structure.places["unembedding"], model.structure.places["final_norm"]}
    assert ends <= {path for path, side in guard.seen if side == "call"}
    assert len({path for path, side in guard.seen if side != "call"}) > 4 * model.structure.n_layers


def read_the_embedding(model, arrays, plan):
    with model.trace(arrays["tokens"]):
        found = save([model.model.embed_tokens.output])
    return {"found": found[0]}


def read_inside_an_mlp(model, arrays, plan):
    with model.trace(arrays["tokens"]):
        found = save([model.model.layers[0].mlp.act_fn.output])
    return {"found": found[0]}


def call_the_embedding(model, arrays, plan):
    with model.trace(arrays["tokens"]):
        found = save([model.model.embed_tokens(arrays["tokens"])])
    return {"found": found[0]}


def look_into_attention(model, arrays, plan):
    with model.trace(arrays["tokens"]):
        found = save([model.model.layers[0].self_attn.source])
    return {"found": found[0]}


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (read_the_embedding, "part of the vocabulary"),
        (call_the_embedding, "part of the vocabulary"),
        (read_inside_an_mlp, "is a piece"),
        (look_into_attention, "shows pieces"),
    ],
)
def test_the_guard_can_be_broken(wrapped, monkeypatch, job, said):
    """Else the test above says nothing."""
    model = wrapped("llama-gqa")
    tokens = torch.as_tensor(families.random_ids(model.module))
    with Guard(model)(monkeypatch), pytest.raises(Exception, match=said):
        run_session(lambda *given: job(*given[:3]), model.nn, {"tokens": tokens}, {})


def test_no_family_with_learned_positions_is_split():
    """Of these transformers publishes no plan: were there one, their token embedding would be read in pieces."""
    kinds = {kind for each in ARCHITECTURES if each.position_embedding for kind in each.model_types}
    assert {"gpt2", "opt"} <= kinds
    for kind in kinds:
        assert not getattr(AutoConfig.for_model(kind), "base_model_tp_plan", None), kind
    assert AutoConfig.for_model("llama").base_model_tp_plan
