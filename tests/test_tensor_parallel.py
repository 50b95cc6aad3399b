"""Hosts that split each layer among processes: the numbers are those of one process, and no split embedding is read."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import families
import further
import pytest
import torch
from test_sandbox import RELATIVE, save_with_tokenizer
from transformers import AutoConfig

from selfrepair_nn.components import FinalNorm, Head, Layers, Mlp, Neuron, Norm, Routing, select_heads
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.models.architectures import ARCHITECTURES
from selfrepair_nn.models.load import load
from selfrepair_nn.replacements import OtherHead, Reinforce
from selfrepair_nn.tracing import clean, terms
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

TWO_RANKS = Path(__file__).with_name("two_ranks.py")
SECONDS = 240
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
    return [*found, Graph(((Neuron(0, 3), Head(1, 0)), (Neuron(1, 2),)), neurons=1)]


def asked_of(model):
    """What both are asked: (arrays, plan) of each graph."""
    ids = torch.as_tensor(families.random_ids(model.module))
    arrays = {"tokens": ids, "partner_tokens": ids.roll(1, 0), "edited_position": torch.tensor([1, 3, 0, 5])}
    return [(arrays, graph.plan(model.layout) | {"tokens_per_pass": 64}) for graph in graphs(model.structure)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two_processes(folder):
    """Run what `folder` asks for; the hashes of the two differ, so that none may follow the order of a set."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
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
        expected[path] = [run_session(ablation_job, model.nn, *each) for each in asked[path]]
    torch.save(asked, tmp_path / "asked.pt")
    for given in in_two_processes(tmp_path):
        for path, here in expected.items():
            assert given[path]["split"] >= 3 * 6
            for one, other in zip(given[path]["results"], here, strict=True):
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
    for arrays, plan in asked_of(model)[:1]:
        run_session(ablation_job, model.nn, arrays, plan)
    assert "layers" in places
    assert ("token_embedding" in places) == model.structure.position_embedding == (name == "gpt2")


def test_no_family_with_learned_positions_is_split():
    """Of these transformers publishes no plan: were there one, their token embedding would be read in pieces."""
    kinds = {kind for each in ARCHITECTURES if each.position_embedding for kind in each.model_types}
    assert {"gpt2", "opt"} <= kinds
    for kind in kinds:
        assert not getattr(AutoConfig.for_model(kind), "base_model_tp_plan", None), kind
    assert AutoConfig.for_model("llama").base_model_tp_plan
