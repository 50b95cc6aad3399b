"""The same command on a real NDIF server: the same store, whoever serves the model and whenever the client is killed.

Where nothing else is said the server trusts the client, which is quick: in the sandbox every job starts a process.
`pytest -rP` shows what was measured.
"""

import json
import random
import signal
import time
import urllib.error
import urllib.request
from datetime import datetime
from functools import cache
from itertools import product
from pathlib import Path

import nnsight
import numpy as np
import pytest
import torch
import xarray as xr
from far import RUN
from made import SWEPT
from standing import BLOCKS
from terminal import assert_same_numbers, resume_command
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.backends.local import backend, greeted_here, only
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import Ledger, ledger_path, lines
from selfrepair_nn.backends.ndif.served import ServedModel, greeted
from selfrepair_nn.backends.ndif.server import Server
from selfrepair_nn.estimating.traffic import crossing_bytes
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.apart import compared
from selfrepair_nn.models.greeting import fingerprint_of
from selfrepair_nn.models.load import describe, load, structure_only
from selfrepair_nn.tracing.session import ASKED, RESULT

pytestmark = pytest.mark.slow
RELATIVE = 1e-4  # float32
NEOX, LLAMA, SMOLLM2, BFLOAT16 = "tiny-neox", "tiny-llama", "smollm2", "tiny-neox-bfloat16"
MODELS, ACCESS = (NEOX, LLAMA, SMOLLM2), ("trusted", "sandboxed")
CHOICES = {
    NEOX: ["--layers", "3:5", "--tokens", 256, "--length", 32],
    LLAMA: ["--layers", "3:5", "--tokens", 256, "--length", 32],
    SMOLLM2: ["--heads", "14.3,29.*", "--tokens", 128, "--length", 32],
}


def remotely(far, server, model, out, *choices, key=None, **env):
    env |= {} if key is None else {"NDIF_API_KEY": key}
    command = ["run", "heads", "--model", f"local/{model}", "--host", server.url, "--out", out]
    return far.run(*command, *choices, **env)


@pytest.fixture(scope="module")
def loaded(server):
    """loaded(model): the same weights in this process."""
    return cache(lambda name: load(str(server.place.models[f"local/{name}"])))


@pytest.fixture(scope="module")
def here(loaded, tmp_path_factory):
    """here(model, *choices): the path of the store that the same choices give in this process."""

    @cache
    def local(name, *choices):
        out = tmp_path_factory.mktemp("here") / "s.zarr"
        sr.run("heads", model=loaded(name), out=out, progress=False, **named(choices))
        return out

    return local


def named(choices):
    """Options of the command as those of the function."""
    pairs = zip(choices[::2], choices[1::2], strict=True)
    return {str(flag).removeprefix("--").replace("-", "_"): value for flag, value in pairs}


def job_seconds_here(model, choices):
    """How long the same ablation jobs take in this process."""
    experiment = prepare("heads", sr.Options(model=model, **named(choices)))
    units = Sweep(experiment, plans(experiment, model.layout), {}, None).units(experiment.work.units)
    began = time.perf_counter()
    for _ in backend("local", model)(units):
        pass
    return time.perf_counter() - began


def rate(store, seconds):
    """Seconds, and how many head·tokens that is a second."""
    found = xr.open_zarr(store)
    pairs = int(found.selected.sum()) * found.logit.size
    return f"{seconds:.1f} s, {pairs / seconds:.0f} head·tokens a second"


def job_seconds(store):
    """How long a run's ablation jobs were away, in all, each from its sending to its result's arrival."""
    when = {
        (each["part"], each["event"]): datetime.fromisoformat(each["time"])
        for each in lines(ledger_path(store))
    }
    parts = [part for part, event in when if event == "fetched" and part.startswith("ablation")]
    return sum((when[part, "fetched"] - when[part, "sending"]).total_seconds() for part in parts)


def assert_as_planned(server, store, model, choices):
    """Of a run that has just ended in the sandbox: what its ablation jobs moved is what a plan says."""
    jobs = len({each["part"] for each in lines(ledger_path(store)) if each["part"].startswith("ablation")})
    crossed = server.crossed()[-jobs:]
    moved, seconds = (sum(each[what] for each in crossed) for what in ("bytes", "seconds"))
    experiment = prepare("heads", sr.Options(model=model, host=server.url, **named(choices)))
    expected = crossing_bytes(experiment.work, itemsize=4)
    found = xr.open_zarr(store)
    pairs = int(found.selected.sum()) * found.logit.size
    print(f"{choices}: {moved / pairs:.0f} bytes and {1000 * seconds / pairs:.3f} ms in the sandbox a head and token")
    assert abs(moved / expected - 1) < 0.05


def assert_same(there, here, limit=RELATIVE):
    """Every number within `limit` of the logits' spread of the local one."""
    with xr.open_zarr(there) as far_away, xr.open_zarr(here) as close:
        scale = float(close.logit.std())
        for name in close.data_vars:
            one, other = far_away[name].values, close[name].values
            if other.dtype.kind != "f":
                assert np.array_equal(one, other), name
                continue
            assert np.array_equal(np.isnan(one), np.isnan(other)), name
            assert np.nanmax(np.abs(one - other), initial=0) <= limit * scale, name


def key_of(server, access, model=NEOX):
    """The key that the server treats so; skips the test where the server has no such model."""
    if f"local/{model}" not in server.place.models:
        pytest.skip(f"{model} CANNOT BE HAD and was not tried on a real NDIF server")
    return {"trusted": server.trusted_key, "sandboxed": server.key}[access]


FILLED = representative(
    product(ACCESS, MODELS, ["none", "all"]),
    ("trusted", NEOX, "none"),
    ("sandboxed", NEOX, "all"),
    ("sandboxed", LLAMA, "all"),
)


@pytest.mark.parametrize("asked", FILLED, ids="-".join)
def test_a_served_model_fills_the_same_store(far, server, here, loaded, tmp_path, asked):
    """Its closure, too, is measured: small, and not zero by construction."""
    access, model, components = asked
    key, choices = key_of(server, access, model), [*CHOICES[model], "--components", components]
    began = time.perf_counter()
    ended = remotely(far, server, model, tmp_path / "s.zarr", *choices, key=key)
    seconds = time.perf_counter() - began
    assert (ended.code, ended.err) == (0, "")
    assert_same(tmp_path / "s.zarr", here(model, *choices))
    found = xr.open_zarr(tmp_path / "s.zarr")
    if model == SMOLLM2:  # of a tiny one they say nothing
        there = rate(tmp_path / "s.zarr", job_seconds(tmp_path / "s.zarr"))
        close = rate(tmp_path / "s.zarr", job_seconds_here(loaded(model), choices))
        print(f"{model} {components}, its ablations alone: there {there}; here {close}")
    assert 0 < np.abs(found.closure).max() <= RELATIVE * float(found.logit.std())
    moved = json.loads(found.attrs["traffic"])
    print(f"{model} {components}, the whole command: {rate(tmp_path / 's.zarr', seconds)}; {moved}")
    if access == "sandboxed":
        assert_as_planned(server, tmp_path / "s.zarr", loaded(model), choices)


@pytest.mark.parametrize("model", representative([NEOX, LLAMA], LLAMA))
def test_totals_alone_cross_into_the_sandbox_as_planned(far, server, here, loaded, tmp_path, model):
    choices = [*CHOICES[model], "--split", "total"]
    ended = remotely(far, server, model, tmp_path / "s.zarr", *choices, key=server.key)
    assert (ended.code, ended.err) == (0, "")
    assert_same(tmp_path / "s.zarr", here(model, *choices))
    assert_as_planned(server, tmp_path / "s.zarr", loaded(model), choices)


@pytest.mark.parametrize("asked", representative(product(ACCESS, MODELS), ("sandboxed", LLAMA)), ids="-".join)
def test_identity_changes_nothing_there(far, server, tmp_path, asked):
    """The control: what is written back is what was there."""
    access, model = asked
    key, choices = key_of(server, access, model), [*CHOICES[model], "--ablation", "identity"]
    ended = remotely(far, server, model, tmp_path / "s.zarr", *choices, key=key)
    assert ended.code == 0, ended.err
    found = xr.open_zarr(tmp_path / "s.zarr").load()
    scale = float(found.logit.std())
    for name in ("logit_change", "mean_logit_change", "self_repair", "from_heads", "from_mlps", "from_norm"):
        assert np.abs(found[name]).max() <= RELATIVE * scale, name
    found = found.where(found.selected)
    assert found.direct_effect.equals(found.ablated_direct_effect)


TOP, SHARE, UNTIL = (
    ["--components", "top"],
    ["--select", "top-share"],
    ["--until-ci", 0.5, "--share", 0.3, "--length", 8],
)


@pytest.mark.parametrize("more", representative([TOP, SHARE, UNTIL], TOP, UNTIL), ids=str)
def test_of_the_top_tokens_only_the_same_comes_back(far, server, here, tmp_path, more):
    choices = [*CHOICES[LLAMA], *more]
    ended = remotely(far, server, LLAMA, tmp_path / "s.zarr", *choices)
    assert ended.code == 0, ended.err
    assert_same(tmp_path / "s.zarr", here(LLAMA, *choices))


@pytest.mark.thorough
def test_mean_ablation_is_the_same_there(far, server, here, tmp_path):
    choices = [*CHOICES[NEOX], "--ablation", "mean"]
    ended = remotely(far, server, NEOX, tmp_path / "s.zarr", *choices)
    assert ended.code == 0, ended.err
    assert_same(tmp_path / "s.zarr", here(NEOX, *choices))


def test_several_variants_of_a_recipe_are_the_same_there(far, server, tmp_path):
    choices = {"tokens": 64, "length": 16, "layers": "6:"}
    asked = [each for name, value in choices.items() for each in (f"--{name}", value)]
    command = ["run", "ablation_kinds", "--model", "local/tiny-neox", "--host", server.url]
    ended = far.run(*command, "--out", tmp_path / "s.zarr", *asked)
    assert ended.code == 0, ended.err
    sr.run("ablation_kinds", model=NEOX, out=tmp_path / "l.zarr", progress=False, **choices)
    assert_same(tmp_path / "s.zarr", tmp_path / "l.zarr")


# ---------------------------------------------------------------- what is kept, and what is not


@pytest.fixture(scope="module")
def ran(far, server, tmp_path_factory):
    """A finished remote run: its store and its outcome."""
    store = tmp_path_factory.mktemp("ran") / "s.zarr"
    return store, remotely(far, server, NEOX, store, *CHOICES[NEOX])


def test_a_store_tells_which_server_it_comes_from(server, ran):
    attributes = xr.open_zarr(ran[0]).attrs
    assert attributes["backend"] == "remote"
    assert attributes["dtype"] == "float32"
    assert {"kind", "configuration", "tokenizer"} == json.loads(attributes["identity"]).keys()
    there = json.loads(attributes["server"])
    assert there["host"] == server.url
    assert {"python", "torch", "transformers", "nnsight", "ndif"} <= there.keys()
    assert there["nnsight"] == "0.8.1"


def test_a_store_of_a_server_holds_the_numbers_of_the_same_model(ran, here):
    """As one made here, by what each model made of known vectors; of its process only what that can know."""
    there, close = (xr.open_zarr(path) for path in (ran[0], here(NEOX, *CHOICES[NEOX])))
    assert sr.model_differences(there, close) == []
    greeting = json.loads(there.attrs["greeting"])
    told = [greeting[name] for name in ("computes_in", "weights_in", "attention", "tensor_parallel")]
    assert told == ["float32", "float32", "sdpa", 1]


@pytest.fixture(scope="module")
def greet(server, tmp_path_factory):
    """greet(key, model, source): the greeting of the model that the server serves under a name."""

    def greeting(key, model, source=NEOX):
        path = str(server.place.models[f"local/{source}"])
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("NDIF_API_KEY", key)
            served = ServedModel(Server(server.url, 60), structure_only(describe(path), None))
            served.key = served.key.replace(path, f"local/{model}")
            ledger = Ledger(tmp_path_factory.mktemp("greet") / "x.jsonl", "run")
            return greeted(served, ledger, 60)

    return greeting


def test_whose_weights_answer_is_told_in_the_sandbox_too(server, greet, loaded):
    """There the name of attention is hidden; the server says what weights are held in, and whether layers are split."""
    there, close = greet(server.key, NEOX), greeted_here(loaded(NEOX))
    found = compared(close, there)
    assert (found.kind, found.differences) == ("same", [])
    assert (there["weights_in"], there["attention"], there["tensor_parallel"]) == ("float32", "fused", 1)
    coarse = greet(server.key, BFLOAT16)
    found = compared(there, coarse)
    assert found.kind == "rounded"
    assert found.differences == [
        "it computes in float32 there, bfloat16 here",
        "weights are in float32 there, bfloat16 here",
    ]
    again = compared(coarse, greet(server.trusted_key, BFLOAT16))
    assert (again.kind, again.differences, again.notes) == ("same", [], [])


def test_bare_xarray_opens_a_store_that_has_a_ledger(ran):
    assert ledger_path(ran[0]).exists()
    assert xr.open_zarr(ran[0], consolidated=False).done.all()


def test_texts_of_unequal_length_give_the_same_there(far, server, here, tmp_path):
    """Each a row of its own, with the mean over their tokens alone in a head's place."""
    file, out = tmp_path / "texts.txt", tmp_path / "texts.zarr"
    file.write_text("\n\f\n".join(("The dog ran to the house by the sea.", "Once there was a king.", "Who?")))
    choices = ["--prompts", file, "--rows-are", "texts", "--layers", "7", "--ablation", "mean", "--tokens", 64]
    remotely(far, server, NEOX, out, *choices)
    found, expected = xr.open_zarr(out), xr.open_zarr(here(NEOX, *choices))
    assert len({*found.text_positions.values.tolist()}) == 3
    np.testing.assert_array_equal(found.counted, expected.counted)
    for name in ("logit", *SWEPT):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)


def test_little_comes_back_and_less_goes_out(ran):
    store = ran[0]
    moved = json.loads(xr.open_zarr(store).attrs["traffic"])
    on_disk = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    found = xr.open_zarr(store)
    kept = sum(found[name].nbytes for name in SWEPT)
    pairs = found.direct_effect.size
    print(
        f"{moved}; {on_disk} bytes on disk, {kept} in memory; {moved['bytes_returned'] / pairs:.1f} B a head and token"
    )
    assert moved["bytes_returned"] <= 2 * min(on_disk, kept)
    assert moved["bytes_sent"] <= 15_000 * moved["jobs"]


def test_no_weight_is_downloaded(server, ran):
    """The hub would not give one, either."""
    cached = {path.name for path in server.client_cache.rglob("*")}
    assert "config.json" in cached
    assert not [name for name in cached if name.endswith((".safetensors", ".bin"))]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server.hub_url}/local/tiny-neox/resolve/main/model.safetensors")


def look_around(model, arrays, plan):
    """A job that tells how much of the model has no weights where it runs."""
    hidden = [parameter.device.type == "meta" for parameter in model._module.parameters()]
    return {"hidden": torch.tensor(hidden).float().mean()[None]}


@pytest.mark.parametrize("access", ACCESS)
def test_in_the_sandbox_a_job_reaches_no_weights(server, access, tmp_path, monkeypatch):
    """And its result says what it is the result of."""
    monkeypatch.setenv("NDIF_API_KEY", key_of(server, access))
    nnsight.register(__name__)
    source = str(server.place.models["local/tiny-neox"])
    served = ServedModel(Server(server.url, 60), structure_only(describe(source), None))
    served.key = served.key.replace(source, "local/tiny-neox")
    flight = JobsInFlight(served, Ledger(tmp_path / "x.jsonl", "run"), 1, 60)
    looking = Unit("look around", look_around, slice(0, 1), {}, lambda _: {}, {"hidden": (1,)})
    whole, said = served.server.fetch, []

    def fetch(address):
        found, size = whole(address)
        said.append(found[RESULT][ASKED])
        return found, size

    monkeypatch.setattr(served.server, "fetch", fetch)
    assert only(flight, looking)["hidden"] == (access == "sandboxed")
    assert said == ["look around, prompts 0 to 0, of run run"]


def test_the_same_command_again_asks_no_server(far, server, ran):
    before = ledger_path(ran[0]).read_bytes()
    again = remotely(far, server, NEOX, ran[0], *CHOICES[NEOX])
    assert (again.code, again.out) == (0, ran[1].out)
    assert ledger_path(ran[0]).read_bytes() == before


def test_a_store_of_a_local_run_is_not_continued_remotely(far, server, here):
    ended = remotely(far, server, NEOX, here(NEOX, *CHOICES[NEOX]), *CHOICES[NEOX])
    assert ended.code == 1
    assert "holds another run" in ended.err


def assert_kept_secret(secrets, folder, outcomes):
    """None of them is in a file of the folder, or was printed."""
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    said = "".join(ended.out + ended.err for ended in outcomes)
    for secret in secrets:
        assert secret not in said
        assert secret.encode() not in written


def test_no_key_is_written_or_printed(far, server, tmp_path):
    token = {"HF_TOKEN": "hf_plantedPLANTEDplanted"}
    outcomes = [
        remotely(far, server, NEOX, tmp_path / "s.zarr", *CHOICES[NEOX], **token),
        far.run("doctor", "--host", server.url, **token),
        far.run("info", tmp_path / "s.zarr", **token),
        far.run("jobs", tmp_path / "s.zarr", **token),
    ]
    assert [ended.code for ended in outcomes] == [0, 0, 0, 0]
    assert_kept_secret([server.trusted_key, *token.values()], tmp_path, outcomes)


def test_keys_that_are_not_accepted(far, server, tmp_path):
    """What the server says comes through, but for a key that it repeats; with a right one the run goes on."""
    store, outcomes = tmp_path / "s.zarr", []
    refused = {
        "": "Missing or invalid API key",
        "planted-malformed-key": "Invalid API key format: '***'",
        "00000000-0000-4000-8000-00000000dead": "Invalid API key.",
    }
    for key, said in refused.items():
        ended = remotely(far, server, NEOX, store, *CHOICES[NEOX], key=key)
        print(f"key {key!r}: exit {ended.code}; {ended.err.strip()}")
        assert ended.code == 1
        assert ended.err.count("\n") == 1
        assert said in ended.err
        assert "set NDIF_API_KEY" in ended.err
        outcomes += [ended, far.run("jobs", store, NDIF_API_KEY=key)]
        assert said in outcomes[-1].out
    assert_kept_secret(filter(None, refused), tmp_path, outcomes)
    mended = remotely(far, server, NEOX, store, *CHOICES[NEOX])
    assert mended.code == 0, mended.err


# ---------------------------------------------------------------- bfloat16


def test_a_bfloat16_server(far, server, tmp_path):
    """Readouts in float32 survive the autocast; the noise floor is the dtype's and marks what lies under it."""
    ended = remotely(far, server, BFLOAT16, tmp_path / "s.zarr", *CHOICES[NEOX])
    assert ended.code == 0, ended.err
    found = xr.open_zarr(tmp_path / "s.zarr").load()
    choices = {"model": NEOX, "layers": "3:5", "tokens": 256, "length": 32, "progress": False}
    sr.run("heads", dtype="bfloat16", out=tmp_path / "b.zarr", check=False, **choices)
    sr.run("heads", out=tmp_path / "f.zarr", **choices)
    same, exact = (xr.open_zarr(tmp_path / f"{name}.zarr").load() for name in ("b", "f"))
    assert found.attrs["dtype"] == "bfloat16"
    assert found.direct_effect.dtype == np.float32
    scale = float(exact.logit.std())
    print(
        f"noise floor {found.noise_floor.values} logits, {float(np.abs(found.logit_change).mean()):.3f} mean change"
    )
    assert (found.noise_floor > 100 * exact.noise_floor).all()
    assert (found.noise_floor < 0.1 * scale).all()
    assert np.abs(found.direct_effect - same.direct_effect).max() <= RELATIVE * scale
    assert np.abs(found.logit_change - same.logit_change).max() <= 0.05 * scale
    assert np.abs(found.direct_effect - exact.direct_effect).max() <= 0.05 * scale
    assert "noise floor" in ended.out


# ---------------------------------------------------------------- interruptions


def done(store):
    return int(xr.open_zarr(store).done.sum()) if store.exists() else 0


def sent(store):
    return [each for each in lines(ledger_path(store)) if each["event"] == "sending"]


def run_command(server, store):
    return ["run", "heads", "--model", "local/tiny-neox", "--host", server.url, "--out", store, *RUN]


def assert_sent_once(store):
    """What a kill kept from leaving, between the ledger and the request, the server never heard of: it was not sent."""
    unheard = {each["job"] for each in lines(ledger_path(store)) if each.get("kind") == "unheard"}
    work = [
        each["part"]
        for each in sent(store)
        if not each["part"].startswith("first job") and each["job"] not in unheard
    ]
    assert len(work) == len(set(work)), "a job was sent twice"


@pytest.mark.thorough  # tests/test_faults.py kills both sides in every run
def test_killed_at_random_moments_nothing_is_lost_or_done_twice(far, server, undisturbed, tmp_path):
    store, rng = tmp_path / "s.zarr", random.Random(0)
    for _ in range(5):
        begun = len(lines(ledger_path(store)))
        client = far.start(*run_command(server, store), blocks=BLOCKS)
        client.until(lambda begun=begun: len(lines(ledger_path(store))) > begun + 3)
        time.sleep(rng.random() / 5)
        client.send(signal.SIGKILL)
        assert client.wait().code == -signal.SIGKILL
    assert far.run(*run_command(server, store)).code == 0
    assert_same_numbers(store, undisturbed)
    assert_sent_once(store)


@pytest.mark.parametrize("number", representative([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_interrupted_it_says_how_to_go_on(far, server, tmp_path, number):
    store = tmp_path / "s.zarr"
    command = run_command(server, store)
    client = far.start(*command, blocks=BLOCKS)
    client.until(lambda: done(store) > 0)
    client.send(number)
    ended = client.wait()
    assert ended.code == 75
    assert "interrupted" in ended.err
    assert resume_command(ended.err) == list(map(str, command))
    shown = far.run("jobs", store)
    assert "on the server" in shown.out
    assert far.run(*command).code == 0
    assert_sent_once(store)


# ---------------------------------------------------------------- before anything is sent


def test_without_a_choice_of_how_much_the_plan_is_printed_and_nothing_sent(far, server, tmp_path):
    ended = remotely(far, server, NEOX, tmp_path / "s.zarr")
    assert ended.code == 2
    assert "ablated passes" in ended.out
    assert "crossings" in ended.out
    assert "--layers" in ended.err
    assert "nothing was sent" in ended.err
    assert not [*tmp_path.iterdir()]


def test_a_large_run_is_not_started_unasked(far, server, tmp_path):
    choices = ["--tokens", 16384, "--length", 8, "--batch-size", 1]
    ended = remotely(far, server, NEOX, tmp_path / "s.zarr", *choices)
    assert ended.code == 2
    assert "--yes" in ended.err
    assert "units           2048 of 1 prompts" in ended.out
    assert not [*tmp_path.iterdir()]


def test_the_plan_says_what_will_be_moved(far, server, ran):
    command = ["plan", "heads", "--model", "local/tiny-neox", "--host", server.url, "--calibrate"]
    shown = far.run(*command, *CHOICES[NEOX])
    assert shown.code == 0, shown.err
    planned = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    assert {"units", "requests", "results", "crossings", "store size"} <= planned.keys()
    assert "as measured on two small jobs" in planned["time"]
    moved = json.loads(xr.open_zarr(ran[0]).attrs["traffic"])
    said = float(planned["results"].split()[1]) * 2**20
    assert moved["bytes_returned"] <= said * 1.5 + 0.1 * 2**20


@pytest.mark.thorough
def test_calibration_estimates_the_time_that_a_run_takes(far, server, tmp_path):
    choices = ["--layers", "2:6", "--tokens", 4096, "--length", 64]
    command = ["plan", "heads", "--model", "local/tiny-neox", "--host", server.url, "--calibrate"]
    shown = far.run(*command, *choices)
    assert shown.code == 0, shown.err
    line = next(line for line in shown.out.splitlines() if line.startswith("time"))
    assert "as measured on two small jobs" in line
    least, _, most, unit = line.removeprefix("time").split(", one job")[0].split()
    least, most = (float(n) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit] for n in (least, most))
    began = time.perf_counter()
    assert remotely(far, server, NEOX, tmp_path / "s.zarr", *choices).code == 0
    took = time.perf_counter() - began
    print(f"estimated {least:.0f} to {most:.0f} s, took {took:.0f} s")
    assert least / 4 < took < 4 * most


def test_doctor_finds_a_healthy_server_healthy(far, server, loaded):
    ended = far.run("doctor", "--host", server.url, "--model", "local/tiny-llama", "--try")
    assert ended.code == 0, ended.err
    assert f"{server.url} answers" in ended.out
    assert "local/tiny-llama running (float32)" in ended.out
    assert "one token; it computes in float32" in ended.out
    assert f"in float32, fingerprint {fingerprint_of(greeted_here(loaded(LLAMA)))}" in ended.out
    assert "attention     sdpa" in ended.out
    assert "layers are not split (tensor parallel 1)" in ended.out
    assert "NDIF key      set" in ended.out


def test_a_model_that_nobody_knows(far, server, tmp_path):
    command = ["run", "heads", "--model", "local/nothing", "--host", server.url, "--tokens", 64]
    ended = far.run(*command, "--out", tmp_path / "s.zarr")
    assert ended.code == 2
    assert "no model 'local/nothing'" in ended.err


def test_no_path_of_this_machine_is_in_the_ledger(ran):
    assert str(Path(ran[0]).parent) not in ledger_path(ran[0]).read_text()
