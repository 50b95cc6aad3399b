"""What others wrote (stores, ledgers, hubs, servers) reaches a terminal, a figure or a page only filtered."""

import json
import logging
import shutil
import sys
import unicodedata
import warnings
from xml.etree import ElementTree

import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn.backends.ndif.doctor import Finding
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.ledger import Ledger, ledger_path
from selfrepair_nn.cli import _quiet_libraries
from selfrepair_nn.errors import SelfRepairError, one_line
from selfrepair_nn.shown import line, shown, tell
from selfrepair_nn.store import Store, take_notes
from selfrepair_nn.wording import legible

TOKEN = "hf_Pl4ntedPlantedPlanted"
HOSTILE = (
    "a\x1b[31mb\x1b]0;owned\x07c\x1b]8;;http://evil\x1b\\d\x9b2Je\x00f\x7f\u202eg\u2066h\ufeffi\u2028j\ud800k\uffff"
    f"<script>l</script>&amp;$\\frac$ {TOKEN}\r\nselfrepair: error: forged"
)
ATTRIBUTES = ("title", "command", "created", "finished", "backend", "dtype", "target", "freeze", "weights")


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    path = tmp_path_factory.mktemp("honest") / "s.zarr"
    sr.run("heads", heads="6.0,6.1,7.0,7.1", tokens=256, length=32, out=path, progress=False)
    return path


@pytest.fixture
def store(honest, tmp_path):
    """The same numbers, with everything that is text rewritten by somebody."""
    path = tmp_path / "s.zarr"
    shutil.copytree(honest, path)
    evil = HOSTILE.replace("\ud800", "")  # no file of metadata can hold half a pair; a ledger's escapes can
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= dict.fromkeys((*ATTRIBUTES, "model", "ablation", evil), evil)
    root["attributes"] |= {
        "provenance": json.dumps({"versions": {evil: evil}, evil: [evil, {evil: evil}]}),
        "run": "r",
    }
    for name, array in root["consolidated_metadata"]["metadata"].items():
        if array["node_type"] == "array":
            array["attributes"] |= {"description": evil, "units": evil, "long_name": evil}
            (path / name / "zarr.json").write_text(json.dumps(array))
    (path / "zarr.json").write_text(json.dumps(root))
    take_notes(path)
    return path


def assert_clean(text, several=True):
    bad = {c for c in text if not c.isprintable()} - ({"\n"} if several else set())
    assert not bad, f"{bad} in {text!r}"
    assert "Pl4nted" not in text
    assert not any(each.startswith("selfrepair: error: forged") for each in text.splitlines())


@pytest.mark.parametrize("command", ["info", "report", "view", "plot", "jobs", "compare-paper"])
def test_commands_on_a_store_of_somebody_else(store, tmp_path, command):
    ledger = Ledger(ledger_path(store), "r")
    ledger.write("sending", HOSTILE, job=HOSTILE, bytes=1)
    ledger.write("failed", HOSTILE, job=HOSTILE, kind=HOSTILE, text=HOSTILE)
    ended = selfrepair(command, store, *(["--reference", "gpt2-small"] if command == "compare-paper" else []))
    assert ended.code == 0, ended.err
    assert_clean(ended.out)
    assert_clean(ended.err)
    assert "\\x1b[31m" in ended.out or command in ("report", "view", "plot")  # which print paths only
    for page in tmp_path.glob("*.html"):
        assert_clean(page.read_text(encoding="utf-8"))
        assert page.read_text(encoding="utf-8").count("<script") == 2  # ours: the explorer's data, and its script
    for drawn in tmp_path.rglob("*.svg"):
        assert_clean(drawn.read_text(encoding="utf-8"))
        ElementTree.parse(drawn)
    kinds = {"report": "*.html", "view": "*.html", "plot": "*.svg"}
    assert command not in kinds or [*tmp_path.rglob(kinds[command])]


def test_summaries_and_figures_of_a_dataset_of_somebody_else(store, tmp_path):
    bare = xr.open_zarr(store)
    evil = bare.assign_coords(ablation=("ablation", [HOSTILE])) if "ablation" in bare.dims else bare
    for ds in (evil, sr.by_head(evil.load())):
        assert_clean(str(sr.summary(ds)))
    for path in sr.plot({HOSTILE: evil, "b": evil}, tmp_path / "figures"):
        if path.suffix == ".svg":
            assert_clean(path.read_text(encoding="utf-8"))
            ElementTree.parse(path)


def test_labels_of_variants_of_somebody_else(tmp_path):
    made = sr.simulate_heads(n_layers=3, n_heads=2, n_prompts=4)
    names = ["mean", "a\x1b[31m\u202eb\nc"]
    ds = xr.concat([made, made], xr.IndexVariable("ablation", names), data_vars="all").assign_attrs(
        model=HOSTILE, ablation=", ".join(names)
    )
    assert_clean(str(sr.summary(ds)))
    for path in sr.plot(ds, tmp_path, ["ablation_kinds"]):
        if path.suffix == ".svg":
            assert_clean(path.read_text(encoding="utf-8"))
            ElementTree.parse(path)


def test_an_honest_store_reads_as_before(honest):
    ds = sr.open_store(honest)
    assert "\\x" not in str(sr.summary(ds))
    same = legible(ds)
    xr.testing.assert_equal(same, ds)
    long = {"command", "history", "references"}
    assert {k for k in ds.attrs if same.attrs[k] != ds.attrs[k]} <= long


def test_names_of_files_and_models_of_somebody_else(tmp_path):
    for arguments in (
        ["info", tmp_path / "a\x1b[31m\u202e.zarr"],
        ["run", "heads", "--model", "./a\x1b[31m\n"],
    ):
        ended = selfrepair(*arguments)
        assert (ended.code, ended.out, ended.err.count("\n")) == (
            arguments[0] == "run" or 1,
            "",
            1,
        ) or ended.code == 2
        assert_clean(ended.err)
    ended = selfrepair("run", "heads", "--tok\x1b[31mens", "3")
    assert_clean(ended.err)


def test_words_of_servers_and_hubs(capsys):
    assert_clean(str(Fault("code", HOSTILE)))
    assert_clean(Fault("code", f"Traceback\n{HOSTILE.partition(chr(13))[0]}").text)
    assert_clean(str(SelfRepairError(HOSTILE)).replace("\\r\nselfrepair", ""))
    assert_clean(one_line(ValueError(HOSTILE)), several=False)
    tell(HOSTILE.partition("\r")[0])
    assert_clean(capsys.readouterr().err)


def test_what_doctor_is_told(monkeypatch):
    found = [Finding(HOSTILE, HOSTILE, False), Finding("models", HOSTILE)]
    monkeypatch.setattr("selfrepair_nn.backends.ndif.doctor.doctor", lambda *a, **k: found)
    ended = selfrepair("doctor")
    assert ended.out.count("\n") == 2
    assert_clean(ended.out)


def test_what_libraries_log_and_warn_of(capsys):
    before = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        _quiet_libraries()
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("huggingface_hub").addHandler(handler)
        logging.getLogger("huggingface_hub").warning("the hub says %s", HOSTILE.partition("\r")[0])
        logging.getLogger("huggingface_hub").removeHandler(handler)
        print(warnings.formatwarning(HOSTILE.partition("\r")[0], UserWarning, "x.py", 1))
    finally:
        logging.setLogRecordFactory(before[0])
        warnings.formatwarning = before[1]
    said = capsys.readouterr()
    assert "the hub says a\\x1b[31mb" in said.err
    assert_clean(said.out + said.err)


@given(st.text())
def test_the_filter(text):
    assert line(text).isprintable()
    assert all(c == "\n" or c.isprintable() for c in shown(text))
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in line(text))
    assert shown(shown(text)) == shown(text)
    if text.isprintable():
        assert line(text) == text


def test_ordinary_writing_is_left_alone():
    for text in ("Größe ±0.5 → 2 × 10⁻³", "日本語", "שלום", "🙂", "⟨x, d⟩ −x", "a b\nc"):
        assert shown(text) == text
    assert line("abc" * 100, 10) == "abcabcab …"


def test_what_is_stored_about_a_server_holds_no_key(honest, tmp_path):
    shutil.copytree(honest, tmp_path / "s.zarr")
    Store(tmp_path / "s.zarr").annotate(server={"host": f"x {TOKEN}", "ndif": "1"})
    assert "Pl4nted" not in (tmp_path / "s.zarr" / "zarr.json").read_text()
