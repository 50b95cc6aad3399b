"""A real NDIF server gives the numbers of a model in this process, to clients that have no weights.

Trusted, where the job runs beside the weights, and sandboxed as on a shared server. Each server is started once and
asked everything at once; `pytest -rP` shows what was measured.
"""

import os
import urllib.error
import urllib.request

import pytest
import torch
from client import ask, planned
from ndif_server import MODES, Ndif, missing
from smollm2 import Unavailable, smollm2

from selfrepair_nn.models.load import EMBEDDED, find, load
from selfrepair_nn.prompts import load_prompts
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

REQUIRED = os.environ.get("SELFREPAIR_REQUIRE_SERVER") == "1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        missing() is not None and not REQUIRED, reason=f"NO JOB WAS TRIED ON A REAL NDIF SERVER: {missing()}"
    ),
]
RELATIVE = 1e-4  # float32
RECORDS = ("sums", "full")
REAL = "local/smollm2"
"""Served in one mode only: it is large."""
GRAPHS = {
    **{record: {"replacement": "resample", "record": record} for record in RECORDS},
    "identity": {"replacement": "identity", "record": "full"},
}


def directories(mode):
    """The models that a mode serves: hub name -> directory."""
    found = {f"local/{name}": find(name).location for name in EMBEDDED}
    if mode == "sandboxed":
        try:
            found[REAL] = smollm2()
        except Unavailable as error:
            if REQUIRED:
                raise
            print(f"SmolLM2 CANNOT BE HAD, nothing real is tested: {error}")
    return found


def graph(name, case):
    return GRAPHS[case] | ({"layers": "14,29"} if name == REAL else {})


class Measured:
    """What a mode's server answered, and the same models here."""

    def __init__(self, mode, folder):
        self.models = {name: load(str(path), check=False) for name, path in directories(mode).items()}
        asked = [(name, case) for name in self.models for case in GRAPHS]
        self.arrays = {name: self.prompts(name) for name in self.models}
        requests = [
            {"model": name, "arrays": self.arrays[name], "graph": graph(name, case)} for name, case in asked
        ]
        with Ndif(directories(mode), mode) as self.server:
            self.replies = dict(zip(asked, ask(self.server, requests, folder), strict=True))
            self.weights = {name: self.status(name) for name in self.models}
            self.cached = [p.name for p in (self.server.place.directory / "client").rglob("*") if p.is_file()]

    def prompts(self, name):
        tokens = load_prompts("sample", self.models[name].tokenizer, tokens=256, length=32).tokens
        tokens = torch.as_tensor(tokens)
        return {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}

    def here(self, name, case):
        model = self.models[name]
        plan = planned(model.layout, graph(name, case))
        return run_session(ablation_job, model.nn, self.arrays[name], plan)

    def status(self, name):
        """How the hub answers a client that asks for weights."""
        try:
            urllib.request.urlopen(f"{self.server.hub_url}/{name}/resolve/main/model.safetensors")
        except urllib.error.HTTPError as error:
            return error.code
        return 200


@pytest.fixture(scope="module", params=list(MODES))
def measured(request, tmp_path_factory):
    return Measured(request.param, tmp_path_factory.mktemp("client"))


@pytest.fixture(params=[*(f"local/{name}" for name in EMBEDDED), REAL])
def name(request, measured):
    if request.param not in measured.models:
        pytest.skip(f"{request.param} is served in the other mode")
    return request.param


@pytest.mark.parametrize("record", RECORDS)
def test_ablations_are_the_same_there(measured, name, record):
    reply, here = measured.replies[name, record], measured.here(name, record)
    print(
        f"{measured.server.mode} {name} {record}: up in {measured.server.seconds:.1f} s, "
        f"round trip {reply['seconds']:.2f} s, {reply['sent']} bytes sent, {reply['returned']} returned"
    )
    there = reply["found"]
    assert here["logit_change"].abs().mean() > 1e-2
    assert there.keys() == here.keys()
    for key in here:
        assert there[key].shape == here[key].shape
        assert (there[key] - here[key]).abs().max() <= RELATIVE * here[key].abs().max(), key


def test_identity_changes_nothing_there(measured, name):
    found = measured.replies[name, "identity"]["found"]
    for key in ("logit_change", "mean_logit_change", "from_heads", "from_mlps", "component_change"):
        assert found[key].abs().max() <= RELATIVE * found["logit"].abs().max(), key


def test_the_client_has_no_weights_and_cannot_get_them(measured, name):
    assert all(measured.replies[name, case]["devices"] == ["meta"] for case in GRAPHS)
    assert measured.weights[name] == 403
    assert "config.json" in measured.cached
    assert not [each for each in measured.cached if each.endswith((".safetensors", ".bin"))]
