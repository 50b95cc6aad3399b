"""Whoever opens a store without this package: what it holds for them, what the README's lines give."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from damaged import flipped
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import selfrepair_nn as sr
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.running.preliminaries import top_thresholds

ROOT = Path(__file__).parents[1]
SMALL = {
    "tokens": 768,
    "length": 32,
    "layers": "6:",
    "heads": "6.1,6.3,7.1,7.3,7.5",
    "check": False,
    "progress": False,
}
KINDS = {
    "plain": {},
    "top share": {"select": "top-share", "share": 0.05},
    "until": {"until_ci": 0.5},
    "partners": {"resamples": 2},
    "components of a share": {"components": "top", "share": 0.1},
}


@pytest.fixture(scope="module")
def neox():
    return sr.load("tiny-neox", check=False)


@pytest.fixture(scope="module")
def plain(neox, tmp_path_factory):
    return _run(neox, tmp_path_factory.mktemp("readers") / "plain.zarr")


def _run(model, out, **choices):
    return sr.run("heads", model=model, out=out, **SMALL | choices)


def readme() -> str:
    """The README's lines without this package."""
    text = (ROOT / "README.md").read_text().split("And without this package")[1]
    return re.sub(r"^    ", "", re.search(r"(?:^    .*\n|^\n)+", text, re.MULTILINE)[0], flags=re.MULTILINE)


def lines_of(path: Path) -> str:
    """The same of another store."""
    return re.sub(r'open_zarr\(".*?"\)', f"open_zarr({str(path)!r})", readme())


# ---------------------------------------------------------------- the paper's statistic


@pytest.mark.parametrize("kind", KINDS)
def test_the_readmes_lines_give_the_papers_statistic(neox, plain, kind, tmp_path):
    """Of a head that was not selected, nothing."""
    ds = plain if kind == "plain" else _run(neox, tmp_path / "s.zarr", **KINDS[kind])
    found: dict = {}
    exec(lines_of(Path(ds.encoding["source"])), found)
    assert "selfrepair" not in readme()
    repair = found["repair"].mean("resample") if "resample" in found["repair"].dims else found["repair"]
    share = KINDS[kind].get("share") if "select" in KINDS[kind] else None
    known = sr.by_head(ds, share)
    np.testing.assert_allclose(repair, known.top_self_repair, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(repair.isnull(), ~ds.selected)
    if kind != "until":
        np.testing.assert_array_equal(found["top"].sum(("prompt", "position")), known.top_tokens)


@settings(max_examples=60, deadline=None)
@given(
    effects=arrays(np.float32, (3, 7, 4), elements=st.integers(-20, 20).map(float)),
    counted=arrays(bool, (7, 4)).filter(np.any),
    share=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    block=st.integers(1, 7),
)
def test_a_threshold_is_the_last_of_the_top_share(effects, counted, share, block):
    """However many prompts are looked at together, by a plain sort."""
    blocks = [slice(start, min(start + block, 7)) for start in range(0, 7, block)]
    run = SimpleNamespace(counted=counted, precision="float32", graph=SimpleNamespace(ablate=range(3)))
    found = top_thresholds(run, ((each, effects[:, each]) for each in blocks), share)
    ranked = -np.sort(-effects[:, counted], axis=1)
    np.testing.assert_array_equal(found, ranked[:, max(1, int(share * counted.sum())) - 1])


# ---------------------------------------------------------------- what a store tells


def test_heads_are_named_and_every_token_says_whether_it_counts(plain):
    bare = xr.open_zarr(plain.encoding["source"])
    assert bare.head_label.dims == ("layer", "head")
    assert bare.head_label.sel(layer=7, head=5) == "L7H5"
    assert bare.counted.dims == ("prompt", "position")
    assert bare.counted.dtype == bool
    frame = bare.threshold.to_dataframe()
    assert list(frame.head_label)[:2] == ["L6H1", "L6H3"]


def test_global_attributes_are_those_of_the_conventions(plain):
    told = plain.attrs
    assert told["Conventions"] == "CF-1.11, ACDD-1.3"
    assert told["title"] == "heads of tiny-neox"
    assert told["source"].startswith("tiny-neox; selfrepair_nn ")
    assert "Rushing" in told["references"]
    assert f"selfrepair_nn {sr.__version__}" in told["references"]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 selfrepair_nn.run\('heads', .*\)", told["history"]
    )


def test_history_goes_on_where_a_run_does_and_hides_keys(neox, tmp_path, monkeypatch):
    """The threshold is blank until all is there: part of a run says nothing false. A finished run is left as it is."""
    monkeypatch.setenv("HF_TOKEN", "hf_a-key-that-nobody-may-see")
    out, commands = tmp_path / "s.zarr", ["first\n --key hf_a-key-that-nobody-may-see", "second", "third"]
    part = _run(neox, out, shard="1/2", command=commands[0])
    assert part.threshold.isnull().all()
    assert not (part.direct_effect >= part.threshold).any()
    whole = _run(neox, out, shard="2/2", command=commands[1])
    assert not whole.threshold.where(whole.selected, 0).isnull().any()
    assert _run(neox, out, command=commands[2]).attrs == whole.attrs
    history = [line.partition(" ")[2] for line in whole.attrs["history"].splitlines()]
    assert history == ["first --key ***", "second"]


def test_a_damaged_threshold_is_told_and_made_again(neox, plain, tmp_path):
    out = tmp_path / "s.zarr"
    subprocess.run(["cp", "-r", plain.encoding["source"], out], check=True)
    flipped(out / "threshold/c/0/0")
    assert [each.array for each in sr.verify(out)] == ["threshold"]
    np.testing.assert_array_equal(_run(neox, out).threshold, plain.threshold)
    assert not sr.verify(out)


def test_a_store_of_before_goes_on_without_what_it_lacks(neox, plain, tmp_path, monkeypatch):
    real, out = (Experiment.data, Experiment.coordinates), tmp_path / "s.zarr"

    def without(function, name):
        return lambda self: {k: v for k, v in function(self).items() if k != name}

    with monkeypatch.context() as before:
        before.setattr(Experiment, "data", without(real[0], "threshold"))
        before.setattr(Experiment, "coordinates", without(real[1], "head_label"))
        _run(neox, out, shard="1/2")
    found = _run(neox, out, shard="2/2")
    assert not {"threshold", "head_label"} & {*found.variables}
    assert "finished" in found.attrs
    np.testing.assert_array_equal(sr.by_head(found).top_self_repair, sr.by_head(plain).top_self_repair)


# ---------------------------------------------------------------- the oldest readers

STATED = {"zarr": "3.0.8", "xarray": "2024.10", "numpy": "1.25", "pandas": "2.1"}
PINNED = {"zarr": "3.0.8", "xarray": "2024.10.0", "numpy": "1.25.0", "pandas": "2.1.1", "numcodecs": "0.14.0"}
OTHERS = (
    "crc32c",
    "donfig",
    "packaging",
    "python-dateutil",
    "pytz",
    "pyyaml",
    "six",
    "typing-extensions",
    "tzdata",
)
READ = """
import json, sys
sys.path.insert(0, sys.argv[1])
{lines}
import numpy, pandas, zarr
versions = {{each.__name__: each.__version__ for each in (zarr, xr, numpy, pandas)}}
told = dict(versions=versions, repair=repair.values.tolist(), labels=dataset.head_label.values.tolist())
told |= dict(texts=dataset.token_text.values.tolist(), partner=dataset.partner.values.tolist())
told |= dict(done=dataset.done.values.tolist(), blank=dataset.direct_effect.isnull().values.tolist())
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def oldest() -> Path:
    """A directory with the oldest packages that are said to open a store, and nothing else; kept for next time."""
    folder = ROOT / ".cache" / "oldest-readers"
    folder.parent.mkdir(exist_ok=True)
    named = [*(f"{name}=={version}" for name, version in PINNED.items()), *OTHERS]
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "whole").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
            made = subprocess.run(
                [*pip, "--upgrade", "--target", folder, *named], capture_output=True, text=True
            )
            if made.returncode and os.environ.get("SELFREPAIR_REQUIRE_OLDEST") != "1":
                pytest.skip(f"NO STORE WAS OPENED WITH THE OLDEST XARRAY AND ZARR: {made.stderr[-200:]}")
            assert not made.returncode, made.stderr
            (folder / "whole").touch()
    return folder


def test_the_oldest_packages_that_are_said_to_open_a_store_do(oldest, plain):
    """In an interpreter that sees no others: numbers, texts, flags, what is blank, and the README's lines."""
    path = Path(plain.encoding["source"])
    python = getattr(sys, "_base_executable", sys.executable)
    code = READ.format(lines=lines_of(path))
    ended = subprocess.run([python, "-ISc", code, oldest], capture_output=True, text=True, check=False)
    assert not ended.returncode, ended.stderr
    found = json.loads(ended.stdout)
    assert found["versions"] == {name: PINNED[name] for name in STATED}
    np.testing.assert_allclose(found["repair"], sr.by_head(plain).top_self_repair, rtol=0, atol=1e-6)
    for name, own in (("labels", plain.head_label), ("texts", plain.token_text), ("partner", plain.partner)):
        assert found[name] == own.values.tolist()
    assert found["done"] == plain.done.values.tolist()
    assert found["blank"] == plain.direct_effect.isnull().values.tolist()


def test_the_versions_that_are_stated_are_those_that_are_tested():
    said = (ROOT / "docs/store.md").read_text()
    for stated in ("zarr.dev) 3.0.8", "xarray.dev) 2024.10 ", "NumPy 1.25 ", "pandas 2.1\n"):
        assert stated in said
    assert all(PINNED[name].startswith(version) for name, version in STATED.items())
