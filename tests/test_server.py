"""A real NDIF server gives the numbers of a model in this process, to clients that have no weights.

Trusted, where the job runs beside the weights, and sandboxed as on a shared server. A client is one process, so each
mode is asked everything at once; `pytest -rP` shows what was measured.
"""

import urllib.error
import urllib.request
from itertools import product

import pytest
import torch
from client import ask, planned

from selfrepair_nn.models.load import load
from selfrepair_nn.prompts import load_prompts
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

pytestmark = pytest.mark.slow
RELATIVE = 1e-4  # float32
LAYERS = {"local/tiny-neox": None, "local/tiny-llama": None, "local/smollm2": "14,29"}
GRAPHS = {
    "sums": {"replacement": "resample", "record": "sums"},
    "full": {"replacement": "resample", "record": "full"},
    "identity": {"replacement": "identity", "record": "full"},
}


def graph(name, case):
    return GRAPHS[case] | {"layers": LAYERS[name]}


@pytest.fixture(scope="module")
def here(server):
    """The served models, in this process."""
    return {
        name: load(str(server.place.models[name]), check=False)
        for name in LAYERS
        if name in server.place.models
    }


@pytest.fixture(scope="module")
def arrays(here):
    def drawn(tokenizer):
        tokens = torch.as_tensor(load_prompts("sample", tokenizer, tokens=128, length=32).tokens)
        return {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}

    return {name: drawn(model.tokenizer) for name, model in here.items()}


@pytest.fixture(scope="module", params=["trusted", "sandboxed"])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def replies(mode, server, arrays, tmp_path_factory):
    """What the server answers in one mode: by model and case, and by "where" for where jobs run."""
    asked = {
        (name, case): {"model": name, "arrays": arrays[name], "graph": graph(name, case)}
        for name, case in product(arrays, GRAPHS)
    }
    asked |= {"where": {"model": "local/tiny-neox"}}
    env = server.trusted_env if mode == "trusted" else server.env
    found = ask(env, list(asked.values()), tmp_path_factory.mktemp("client"))
    for each, reply in zip(asked, found, strict=True):
        print(f"{mode} {each}: {reply['seconds']:.2f} s, {reply['sent']} B sent, {reply['returned']} B back")
    print(f"the server was up in {server.seconds:.0f} s")
    return dict(zip(asked, found, strict=True))


@pytest.fixture(params=LAYERS)
def name(request, here):
    if request.param not in here:
        pytest.skip(f"{request.param} CANNOT BE HAD and was not tried on a real NDIF server")
    return request.param


def test_a_sandboxed_job_reaches_no_weights(mode, replies):
    assert replies["where"]["found"]["devices"] == {"trusted": ["cpu"], "sandboxed": ["meta"]}[mode]


@pytest.mark.parametrize("record", ["sums", "full"])
def test_ablations_are_the_same_there(replies, here, arrays, name, record):
    model, there = here[name], replies[name, record]["found"]
    local = run_session(ablation_job, model.nn, arrays[name], planned(model.layout, graph(name, record)))
    assert local["logit_change"].abs().mean() > 1e-2
    assert there.keys() == local.keys()
    for key in local:
        assert there[key].shape == local[key].shape
        assert (there[key] - local[key]).abs().max() <= RELATIVE * local[key].abs().max(), key


def test_identity_changes_nothing_there(replies, name):
    found = replies[name, "identity"]["found"]
    for key in ("logit_change", "mean_logit_change", "from_heads", "from_mlps", "component_change"):
        assert found[key].abs().max() <= RELATIVE * found["logit"].abs().max(), key


def test_no_weights_come_to_the_client(replies, server, name):
    assert all(replies[name, case]["devices"] == ["meta"] for case in GRAPHS)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server.hub_url}/{name}/resolve/main/model.safetensors")
    cached = {path.name for path in server.client_cache.rglob("*")}
    assert "config.json" in cached
    assert not [each for each in cached if each.endswith((".safetensors", ".bin"))]


def test_what_crosses_is_small(replies, name):
    for case in GRAPHS:
        reply = replies[name, case]
        assert reply["returned"] <= sum(values.nbytes for values in reply["found"].values())
        assert reply["sent"] < 32_000  # the code of the job, and token ids
