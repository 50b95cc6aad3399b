"""For scripts, shells and notebooks: JSON that mirrors Python, as much on stderr as was asked for, completion."""

import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.shell_completion import ShellComplete
from terminal import selfrepair
from transformers.utils import logging as library

import selfrepair_nn as sr
from selfrepair_nn.cli import cli
from selfrepair_nn.errors import Incomplete, NotAgreed
from selfrepair_nn.figures import FIGURES
from selfrepair_nn.progress import Bar, in_notebook
from selfrepair_nn.recipe import recipe_paths
from selfrepair_nn.running import worker
from selfrepair_nn.shown import LOG, as_json, tell, telling

SMALL = ("--tokens", 64, "--length", 16, "--layers", "6:")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    store = tmp_path_factory.mktemp("ran") / "s.zarr"
    return store, selfrepair("run", "heads", *SMALL, "--out", store, "--json")


def answer(*command):
    """The one JSON value that a command prints."""
    ended = selfrepair(*command, "--json")
    assert ended.err == ""
    assert ended.out.count("\n") == 1
    return json.loads(ended.out)


def test_a_run_tells_a_script_what_python_tells(ran):
    store, ended = ran
    assert (ended.code, ended.err) == (0, "")
    found, ds = json.loads(ended.out), sr.open_store(store)
    assert found["store"] == str(store)
    assert found["summary"] == json.loads(as_json(sr.summary(ds).records()))
    assert found["attributes"]["finished"] == ds.attrs["finished"]
    assert found["attributes"]["options"]["tokens"] == 64
    assert found["sizes"] == dict(ds.sizes)
    assert any("95% intervals" in each or "too few" in each for each in found["notes"])


def test_info_tells_the_same_and_what_each_variable_is(ran):
    found, ds = answer("info", ran[0]), sr.open_store(ran[0])
    assert found == json.loads(ran[1].out)
    assert set(found["variables"]) == set(ds.data_vars)
    assert found["variables"]["direct_effect"]["units"] == ds.direct_effect.attrs["units"]
    assert found["variables"]["direct_effect"]["dims"] == ["layer", "head", "prompt", "position"]


def test_a_plan_is_pythons(tmp_path):
    command = ("heads", *SMALL, "--out", tmp_path / "s.zarr")
    found = sr.preview("heads", tokens=64, length=16, layers="6:", out=tmp_path / "s.zarr")
    assert answer("plan", *command) == json.loads(as_json(found))
    assert answer("run", *command, "--dry-run") == json.loads(as_json(found))


def test_recipes_and_checks_and_jobs_and_the_doctor(ran):
    assert [each["name"] for each in answer("recipes")] == list(recipe_paths())
    assert answer("jobs", ran[0]) == {"store": str(ran[0]), "jobs": 0, "parts": []}
    checked = answer("check", "tiny-neox")
    assert checked["family"] == "gpt_neox"
    assert all(each["passed"] and each["error"] <= each["limit"] for each in checked["findings"])
    looked = {each["what"]: each for each in answer("doctor")}
    assert "torch" in looked["versions"]["seen"]


@pytest.mark.parametrize("command", [*cli.commands])
def test_what_is_no_request_is_words_on_stderr_and_one_object_for_a_script(command):
    ended = selfrepair(command, "--xyzzy", "--json")
    assert (ended.code, json.loads(ended.out)) == (2, {"error": "No such option '--xyzzy'.", "exit_code": 2})
    assert "No such option" in ended.err
    assert selfrepair(command, "--xyzzy").out == ""


def test_a_failure_is_words_on_stderr_and_one_object_for_a_script(tmp_path, monkeypatch):
    ended = selfrepair("info", tmp_path / "nothing.zarr", "--json")
    said = json.loads(ended.out)
    assert (ended.code, said["exit_code"]) == (1, 1)
    assert ended.err == f"selfrepair: error: {said['error']}\n"
    assert "no store at" in said["error"]

    def end(error):
        def instead(*_, **__):
            raise error

        monkeypatch.setattr("selfrepair_nn.running.run.run", instead)
        ended = selfrepair("run", "heads", "--json")
        assert json.loads(ended.out)["exit_code"] == ended.code
        return json.loads(ended.out)

    assert end(KeyboardInterrupt())["resume"] == "selfrepair run heads --json"
    assert end(Incomplete("it stopped"))["error"] == "it stopped"
    assert end(OSError(28, "No space left", "x"))["error"] == "x: No space left"
    assert "please report it" in end(ZeroDivisionError())["error"]


def test_a_plan_that_nobody_agreed_to_is_json_where_that_is_asked_for(monkeypatch):
    def refuse(*_, **__):
        raise NotAgreed("units  9\nrequests  9", "add --yes")

    monkeypatch.setattr("selfrepair_nn.running.run.run", refuse)
    ended = selfrepair("run", "heads", "--json")
    said = {"plan": "units  9\nrequests  9", "error": "nothing was sent: add --yes", "exit_code": 2}
    assert (ended.code, json.loads(ended.out)) == (2, said)
    assert ended.err == "selfrepair: error: nothing was sent: add --yes\n"
    assert selfrepair("run", "heads").out == "units  9\nrequests  9\n"


def test_json_has_no_number_that_is_none(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 6)
    found = as_json({"a": float("nan"), "b": (float("inf"), 1), "c": "hf_" + "secret" * 6})
    assert json.loads(found)["a"] is None
    assert json.loads(found)["b"] == [None, 1]
    assert "secretsecret" not in found


# How much is told


def test_quiet_is_silent_but_for_errors(ran, tmp_path):
    idle = ("run", "heads", *SMALL, "--mean-prompts", 3, "--out", tmp_path / "s.zarr")
    assert "nothing in this run depends on it" in selfrepair(*idle).err
    assert selfrepair(*idle, "--quiet").err == ""
    assert selfrepair("run", "no-such", "-q").err.startswith("selfrepair: error")


def test_log_levels(ran):
    shown = selfrepair("run", "heads", *SMALL, "--out", ran[0], "--log-level", "info")
    assert "tiny-neox: looking at the weights" in shown.err
    assert shown.out == selfrepair("run", "heads", *SMALL, "--out", ran[0]).out
    assert selfrepair("run", "heads", "--log-level", "loud").code == 2


def test_what_is_told_goes_through_logging(capsys):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    LOG.addHandler(handler)
    try:
        tell("something")
        with telling("error"):
            tell("nothing")
    finally:
        LOG.removeHandler(handler)
    assert [(each.name, each.getMessage()) for each in records] == [("selfrepair_nn", "something")]
    assert capsys.readouterr().err == "selfrepair: something\n"


def test_a_notebook_has_a_bar_without_being_asked(monkeypatch, capsys):
    assert not in_notebook()
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook()
    with Bar("tiny-neox", None) as bar:
        bar.stage("loading the model")
        bar.begin(100, 50)
        bar.update(50)
    assert "loading the model" in (shown := capsys.readouterr().err)
    assert "100%" in shown
    with telling("error"), Bar("tiny-neox", None) as bar:
        bar.stage("loading the model")
    assert capsys.readouterr().err == ""


def test_where_no_bar_is_shown_libraries_show_none(monkeypatch):
    monkeypatch.setattr(library, "_tqdm_active", True)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    for progress in (True, False):
        with Bar("tiny-neox", progress):
            assert library.is_progress_bar_enabled() == progress
    seen = []
    monkeypatch.setattr(worker, "_Worker", lambda _: seen.append(library.is_progress_bar_enabled()))
    worker._begun(cast(Any, None))
    assert seen == [False]
    assert library.is_progress_bar_enabled()


# Completion


def offered(*words):
    *given, last = words
    return [
        each.value for each in ShellComplete(cli, {}, "selfrepair", "").get_completions(list(given), last)
    ]


def test_recipes_models_figures_layers_and_heads_are_completed(ran):
    assert "heads" in offered("run", "he")
    assert offered("run", "heads", "--model", "tiny-n")[0] == "tiny-neox"
    assert set(FIGURES) <= set(offered("plot", str(ran[0]), "--figure", ""))
    assert offered("run", "heads", "--model", "tiny-llama", "--layers", "0,")[:2] == ["0,0", "0,1"]
    assert "7.*" in offered("run", "heads", "--heads", "7.")
    assert offered("plot", str(ran[0]), "--layers", "7") == ["7"]
    assert offered("run", "heads", "--model", "no/such", "--layers", "") == []


def test_report_takes_what_plot_takes(ran, tmp_path, monkeypatch):
    plot, report = ({each.name for each in cli.commands[name].params} for name in ("plot", "report"))
    assert plot - {"formats"} == report  # its figures are in it
    page = tmp_path / "page.html"
    chosen = ("--figure", "norm_share", "--layers", "7", "--share", "0.1", "--size", "9x5", "--no-caption")
    ended = selfrepair("report", ran[0], *chosen, "--out", page)
    assert (ended.code, ended.err) == (0, "")
    text = page.read_text()
    assert text.count("<figure>") == 1
    assert "L7H0" in text
    assert "L6H0" not in text.split("All 8 heads")[1].split("</details>")[0]
    assert selfrepair("report", ran[0], "--figure", "nonsense").code == 2
    assert "logprob" in selfrepair("report", ran[0], "--outcome", "logprob", "--out", page).err
    monkeypatch.setattr("selfrepair_nn.report.render", lambda stores, **_: f"{len(stores)} stores")
    both = selfrepair("report", ran[0], ran[0])
    assert (both.code, both.out) == (0, f"{ran[0].with_name('s-s.html')}\n")
    assert ran[0].with_name("s-s.html").read_text() == "2 stores"


def test_what_is_drawn_and_written_is_told_to_a_script(ran, tmp_path):
    store = ran[0]
    for command in (("plot", "--figure", "self_repair_by_layer"), ("report", "--figure", "norm_share"), ("view",)):
        out = tmp_path / ("figures" if command[0] == "plot" else f"{command[0]}.html")
        files = answer(command[0], store, *command[1:], "--out", out)["files"]
        assert len(files) == (2 if command[0] == "plot" else 1)
        assert all(Path(file).stat().st_size for file in files)


def test_verify_tells_a_script_what_is_damaged(ran, tmp_path):
    store = tmp_path / "s.zarr"
    shutil.copytree(ran[0], store)
    assert answer("verify", store) == {"store": str(store), "damaged": [], "finished": True}
    (chunk,) = [path for path in (store / "self_repair" / "c").rglob("*") if path.is_file()][:1]
    chunk.write_bytes(b"rubbish")
    ended = selfrepair("verify", store, "--json")
    assert ended.code == 1
    [damage] = json.loads(ended.out)["damaged"]
    assert (damage["array"], damage["block"]) == ("self_repair", 0)


def test_comparisons_are_told_to_a_script(ran, tmp_path):
    found = answer("compare-paper", ran[0], "--reference", "gpt2-small", "--out", tmp_path / "p")
    ds = sr.compare_paper(ran[0], "gpt2-small")
    assert len(found["means"]) == 2 * ds.sizes["layer"]
    one = next(row for row in found["means"] if (row["source"], row["layer"]) == ("store", 6))
    assert one["direct_effect"] == pytest.approx(float(ds.direct_effect.sel(source="store", layer=6)))
    found = answer("attribution", ran[0], "--out", tmp_path / "a")
    heads = sr.attribution(ran[0])
    assert [row["attributed_change"] for row in found["heads"] if row["layer"] == 7] == pytest.approx(
        heads.attributed_change.sel(layer=7).values.tolist()
    )
    assert found["files"]


@pytest.mark.parametrize("command", sorted({*cli.commands} - {"completion"}))
def test_every_command_has_json_and_its_exit_codes_are_told(command):
    assert "--json" in [name for each in cli.commands[command].params for name in each.opts]
    page = (Path(__file__).parents[1] / "docs" / "scripts.md").read_text()
    assert f"`{command}`" in page
