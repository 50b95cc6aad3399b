"""The same command on a real NDIF server: the same store, whoever serves the model and whenever the client is killed.

`pytest -rP` shows what was measured.
"""

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from far import Far
from terminal import assert_same_numbers, resume_command

import selfrepair_nn as sr
from selfrepair_nn.remote.ledger import ledger_path, lines
from selfrepair_nn.variables import SWEPT

pytestmark = pytest.mark.slow
RELATIVE = 1e-4  # float32
NEOX, LLAMA, SMOLLM2, BFLOAT16 = "tiny-neox", "tiny-llama", "smollm2", "tiny-neox-bfloat16"
CHOICES = {
    NEOX: ["--layers", "3:5", "--tokens", 256, "--length", 32],
    LLAMA: ["--layers", "3:5", "--tokens", 256, "--length", 32],
    SMOLLM2: ["--heads", "14.3,29.*", "--tokens", 128, "--length", 32],
}


@pytest.fixture(scope="module")
def far(server, tmp_path_factory):
    """Clients of the healthy server: they have a key, and no weights."""
    with Far(server.env, tmp_path_factory.mktemp("far")) as clients:
        yield clients


def remotely(far, server, model, out, *choices, key=None, **env):
    env |= {} if key is None else {"NDIF_API_KEY": key}
    command = ["run", "heads", "--model", f"local/{model}", "--host", server.url, "--out", out]
    return far.run(*command, *choices, **env)


@pytest.fixture(scope="module")
def here(server, tmp_path_factory):
    """here(model, *choices): the path of the store that the same choices give in this process."""
    made = {}

    def local(model, *choices, **more):
        asked = (model, *choices, *more.items())
        if asked not in made:
            out = tmp_path_factory.mktemp("here") / "s.zarr"
            options = {str(k).removeprefix("--"): v for k, v in zip(choices[::2], choices[1::2], strict=True)}
            source = server.place.models[f"local/{model}"]
            sr.run("heads", model=str(source), out=out, progress=False, **options, **more)
            made[asked] = out
        return made[asked]

    return local


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


@pytest.fixture(scope="module", params=["trusted", "sandboxed"])
def key(request, server):
    return {"trusted": server.trusted_key, "sandboxed": server.key}[request.param]


@pytest.mark.parametrize("components", ["none", "all", "top"])
@pytest.mark.parametrize("model", [NEOX, LLAMA, SMOLLM2])
def test_a_served_model_fills_the_same_store(far, server, here, tmp_path, key, model, components):
    if f"local/{model}" not in server.place.models:
        pytest.skip(f"{model} CANNOT BE HAD and was not tried on a real NDIF server")
    if model == SMOLLM2 and components == "top":
        pytest.skip("tried on the small models")
    choices = [*CHOICES[model], "--components", components]
    began = time.perf_counter()
    ended = remotely(far, server, model, tmp_path / "s.zarr", *choices, key=key)
    seconds = time.perf_counter() - began
    assert (ended.code, ended.err) == (0, "")
    assert_same(tmp_path / "s.zarr", here(model, *choices))
    moved = json.loads(xr.open_zarr(tmp_path / "s.zarr").attrs["traffic"])
    print(f"{model} {components}: {seconds:.1f} s, {moved}")


def test_the_identity_control_changes_nothing(far, server, tmp_path, key):
    ended = remotely(
        far, server, LLAMA, tmp_path / "s.zarr", *CHOICES[LLAMA], "--ablation", "identity", key=key
    )
    assert ended.code == 0, ended.err
    found = xr.open_zarr(tmp_path / "s.zarr").load()
    scale = float(found.logit.std())
    for name in ("logit_change", "mean_logit_change", "self_repair", "from_heads", "from_mlps", "from_norm"):
        assert np.abs(found[name]).max() <= RELATIVE * scale, name
    assert (found.direct_effect == found.ablated_direct_effect).all()


def test_the_closure_of_remote_numbers_is_measured(far, server, tmp_path, key):
    """Heads are read and not the remainder: what the parts leave over is small, and not zero by construction."""
    ended = remotely(far, server, LLAMA, tmp_path / "s.zarr", *CHOICES[LLAMA], key=key)
    assert ended.code == 0, ended.err
    found = xr.open_zarr(tmp_path / "s.zarr").load()
    assert 0 < np.abs(found.closure).max() <= RELATIVE * float(found.logit.std())


def test_mean_ablation_is_the_same_there(far, server, here, tmp_path):
    choices = [*CHOICES[NEOX], "--ablation", "mean"]
    ended = remotely(far, server, NEOX, tmp_path / "s.zarr", *choices)
    assert ended.code == 0, ended.err
    assert_same(tmp_path / "s.zarr", here(NEOX, *choices))


def test_several_variants_of_a_recipe_are_the_same_there(far, server, tmp_path):
    choices = ["--tokens", 64, "--length", 16, "--layers", "6:"]
    ended = far.run(
        "run",
        "ablation_kinds",
        "--model",
        "local/tiny-neox",
        "--host",
        server.url,
        "--out",
        tmp_path / "s.zarr",
        *choices,
    )
    assert ended.code == 0, ended.err
    sr.run(
        "ablation_kinds",
        model=NEOX,
        out=tmp_path / "l.zarr",
        progress=False,
        tokens=64,
        length=16,
        layers="6:",
    )
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
    assert "not known" in attributes["weights"]
    there = json.loads(attributes["server"])
    assert there["host"] == server.url
    assert {"python", "torch", "transformers", "nnsight", "ndif"} <= there.keys()
    assert there["nnsight"] == "0.8.1"


def test_bare_xarray_opens_a_store_that_has_a_ledger(ran):
    assert ledger_path(ran[0]).exists()
    assert xr.open_zarr(ran[0], consolidated=False).done.all()


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


def test_no_weight_is_downloaded(far, server, ran):
    cached = {path.name for path in server.client_cache.rglob("*")}
    assert "config.json" in cached
    assert not [name for name in cached if name.endswith((".safetensors", ".bin"))]


def test_the_same_command_again_asks_no_server(far, server, ran):
    before = ledger_path(ran[0]).read_bytes()
    again = remotely(far, server, NEOX, ran[0], *CHOICES[NEOX])
    assert (again.code, again.out) == (0, ran[1].out)
    assert ledger_path(ran[0]).read_bytes() == before


def test_a_store_of_a_local_run_is_not_continued_remotely(far, server, here):
    ended = remotely(far, server, NEOX, here(NEOX, *CHOICES[NEOX]), *CHOICES[NEOX])
    assert ended.code == 1
    assert "holds another run" in ended.err


def test_no_key_is_written_or_printed(far, server, tmp_path):
    """Keys that are planted where keys belong turn up nowhere, whether the server takes them or repeats them."""
    planted = {"HF_TOKEN": "hf_plantedPLANTEDplanted"}
    outcomes = [remotely(far, server, NEOX, tmp_path / "ok.zarr", *CHOICES[NEOX], **planted)]
    for key in ("planted-malformed-key", "00000000-0000-4000-8000-00000000dead", ""):
        planted[key] = key
        outcomes.append(remotely(far, server, NEOX, tmp_path / "no.zarr", *CHOICES[NEOX], key=key))
    outcomes.append(far.run("doctor", "--host", server.url, HF_TOKEN=planted["HF_TOKEN"]))
    outcomes.append(far.run("info", tmp_path / "ok.zarr", HF_TOKEN=planted["HF_TOKEN"]))
    outcomes.append(far.run("jobs", tmp_path / "no.zarr"))
    outcomes.append(far.run("jobs", tmp_path / "ok.zarr"))
    assert [ended.code for ended in outcomes] == [0, 1, 1, 1, 0, 0, 0, 0]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = "".join(ended.out + ended.err for ended in outcomes)
    assert len(written) > 10_000
    for secret in (server.key, server.trusted_key, *filter(None, planted.values())):
        assert secret not in said
        assert secret.encode() not in written


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "Missing or invalid API key"),
        ("nonsense", "Invalid API key format: '***'"),
        ("00000000-0000-4000-8000-00000000dead", "Invalid API key."),
    ],
)
def test_a_key_that_is_not_accepted(far, server, tmp_path, key, said):
    ended = remotely(far, server, NEOX, tmp_path / "s.zarr", *CHOICES[NEOX], key=key)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert said in ended.err
    assert "set NDIF_API_KEY" in ended.err
    assert "Traceback" not in ended.err
    mended = remotely(far, server, NEOX, tmp_path / "s.zarr", *CHOICES[NEOX])
    assert mended.code == 0, mended.err


# ---------------------------------------------------------------- bfloat16


def test_a_bfloat16_server(far, server, tmp_path):
    """Readouts in float32 survive the autocast; the noise floor is the dtype's and marks what lies under it."""
    choices = ["--layers", "3:5", "--tokens", 256, "--length", 32]
    ended = remotely(far, server, BFLOAT16, tmp_path / "s.zarr", *choices)
    assert ended.code == 0, ended.err
    found = xr.open_zarr(tmp_path / "s.zarr").load()
    sr.run(
        "heads",
        model=NEOX,
        dtype="bfloat16",
        layers="3:5",
        tokens=256,
        length=32,
        out=tmp_path / "b.zarr",
        check=False,
    )
    sr.run("heads", model=NEOX, layers="3:5", tokens=256, length=32, out=tmp_path / "f.zarr")
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


RUN = ["--layers", "2:6", "--tokens", 1024, "--length", 32, "--batch-size", 2]


def done(store):
    return int(xr.open_zarr(store).done.sum()) if store.exists() else 0


def sent(store):
    return [each for each in lines(ledger_path(store)) if each["event"] == "sending"]


def test_killed_at_random_moments_nothing_is_lost_or_done_twice(far, server, here, tmp_path):
    store, rng = tmp_path / "s.zarr", random.Random(0)
    command = ["run", "heads", "--model", "local/tiny-neox", "--host", server.url, "--out", store, *RUN]
    kills = 0
    while True:
        client = far.start(*command)
        if kills < 5:
            begun = len(lines(ledger_path(store)))
            client.until(lambda begun=begun: len(lines(ledger_path(store))) > begun + 3)
            time.sleep(rng.random())
            client.send(signal.SIGKILL)
        ended = client.wait()
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        kills += 1
    assert kills == 5
    assert_same_numbers(store, remote_reference(far, server, tmp_path))
    work = [each["part"] for each in sent(store) if not each["part"].startswith("greeting")]
    assert len(work) == len(set(work)), "a job was sent twice"


def remote_reference(far, server, tmp_path):
    """The same run, undisturbed."""
    store = tmp_path / "undisturbed.zarr"
    ended = remotely(far, server, NEOX, store, *RUN)
    assert ended.code == 0, ended.err
    return store


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on(far, server, tmp_path, number):
    store = tmp_path / "s.zarr"
    command = ["run", "heads", "--model", "local/tiny-neox", "--host", server.url, "--out", store, *RUN]
    client = far.start(*command)
    client.until(lambda: done(store) > 0)
    client.send(number)
    ended = client.wait(30)
    assert ended.code == 75
    assert "interrupted" in ended.err
    assert resume_command(ended.err) == list(map(str, command))
    shown = far.run("jobs", store)
    assert "on the server" in shown.out
    assert far.run(*command).code == 0
    work = [each["part"] for each in sent(store) if not each["part"].startswith("greeting")]
    assert len(work) == len(set(work))


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
    ended = remotely(
        far, server, NEOX, tmp_path / "s.zarr", "--tokens", 16384, "--length", 8, "--batch-size", 1
    )
    assert ended.code == 2
    assert "--yes" in ended.err
    assert "units           2048 of 1 prompts" in ended.out
    assert not [*tmp_path.iterdir()]


def test_the_plan_says_what_will_be_moved(far, server, ran):
    shown = far.run("plan", "heads", "--model", "local/tiny-neox", "--host", server.url, *CHOICES[NEOX])
    assert shown.code == 0, shown.err
    planned = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    assert {"units", "requests", "results", "crossings", "store size"} <= planned.keys()
    moved = json.loads(xr.open_zarr(ran[0]).attrs["traffic"])
    said = float(planned["results"].split()[1]) * 2**20
    assert moved["bytes_returned"] <= said * 1.5 + 0.1 * 2**20


def test_calibration_estimates_the_time_that_a_run_takes(far, server, tmp_path):
    choices = ["--layers", "2:6", "--tokens", 4096, "--length", 64]
    shown = far.run(
        "plan", "heads", "--model", "local/tiny-neox", "--host", server.url, "--calibrate", *choices
    )
    assert shown.code == 0, shown.err
    line = next(line for line in shown.out.splitlines() if line.startswith("time"))
    number, unit = line.split()[2:4]
    seconds = float(number) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]
    began = time.perf_counter()
    assert remotely(far, server, NEOX, tmp_path / "s.zarr", *choices).code == 0
    took = time.perf_counter() - began
    print(f"estimated {seconds:.0f} s, took {took:.0f} s")
    assert took / 6 < seconds < 6 * took


def test_doctor_finds_a_healthy_server_healthy(far, server):
    ended = far.run("doctor", "--host", server.url, "--model", "local/tiny-llama", "--try")
    assert ended.code == 0, ended.err
    assert f"{server.url} answers" in ended.out
    assert "local/tiny-llama running (float32)" in ended.out
    assert "one token; it computes in float32" in ended.out
    assert "NDIF key      set" in ended.out


def test_a_model_that_nobody_knows(far, server, tmp_path):
    ended = far.run(
        "run",
        "heads",
        "--model",
        "local/nothing",
        "--host",
        server.url,
        "--tokens",
        64,
        "--out",
        tmp_path / "s.zarr",
    )
    assert ended.code == 2
    assert "no model 'local/nothing'" in ended.err


def test_no_path_of_this_machine_is_in_the_ledger(ran):
    assert str(Path(ran[0]).parent) not in ledger_path(ran[0]).read_text()
