"""The command line: it mirrors Python, says what it does, and keeps result, progress and exit code apart."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from dataclasses import fields
from multiprocessing.connection import Connection

import click
import pytest
import xarray as xr
from terminal import ENVIRONMENT, Process, assert_same_numbers, files, ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.cli import cli
from selfrepair_nn.errors import UsageError
from selfrepair_nn.options import RENAMED, Options, flag
from selfrepair_nn.recipe import recipe_paths

COMMANDS = sorted(cli.commands)
NOT_OPTIONS = {"recipe", "dry_run", "progress", "calibrate", "machine", "quiet", "log_level"}
HEAVY = ("torch", "transformers", "xarray", "zarr", "nnsight", "datasets", "matplotlib")


def parameters(command):
    return {p.name: p for p in cli.commands[command].params if not getattr(p, "hidden", False)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return ids(tmp_path_factory.mktemp("prompts") / "p.npy")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, model, prompts):
    """A finished run on the command line: its store and its outcome."""
    store = tmp_path_factory.mktemp("ran") / "s.zarr"
    return store, selfrepair("run", "heads", "--model", model, "--prompts", prompts, "--out", store)


# Help


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command, flag):
    shown = selfrepair(command, flag)
    assert (shown.code, shown.err) == (0, "")
    assert re.match(rf"Usage: .*\bselfrepair {command} ", shown.out)
    assert cli.commands[command].help.strip().split("\n")[0].endswith(".")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence_of_help(command):
    shown = " ".join(selfrepair(command, "--help").out.split())
    for name, parameter in parameters(command).items():
        if isinstance(parameter, click.Option):
            assert len(parameter.help.split()) >= 3, name
            assert parameter.opts[0] in shown
            assert parameter.help in shown


def test_without_a_command_the_commands_are_shown():
    shown = selfrepair()
    assert shown.code == 2
    assert all(re.search(rf"^  {command} +\S", shown.err, re.MULTILINE) for command in COMMANDS)


def test_version():
    assert selfrepair("--version").out == f"selfrepair, version {sr.__version__}\n"


# The command line and Python


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("option", fields(Options), ids=lambda option: option.name)
def test_every_choice_of_python_is_a_flag_with_the_same_default(command, option):
    flag = parameters(command)[option.name]
    assert flag.opts[0] == "--" + option.name.replace("_", "-")
    assert flag.default == option.default
    assert option.metadata["help"] == flag.help
    if option.metadata["choices"]:
        assert tuple(flag.type.choices) == option.metadata["choices"]


@pytest.mark.parametrize("command", ["run", "plan"])
def test_every_flag_is_a_choice_of_python(command):
    assert set(parameters(command)) - NOT_OPTIONS == {option.name for option in fields(Options)}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_taken_and_told(model, prompts, old):
    new = RENAMED[old]
    places = ["--model", model, "--prompts", prompts]
    ended = selfrepair("plan", "heads", *places, flag(old), 64)
    assert (ended.code, ended.out) == (0, selfrepair("plan", "heads", *places, flag(new), 64).out)
    assert ended.err == f"selfrepair: {old} is called {new} now: write {flag(new)}, or {new}=… in Python\n"
    both = selfrepair("plan", "heads", *places, flag(old), 64, flag(new), 64)
    assert both.code == 2
    assert f"{old} is the old name of {new}" in both.err


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_not_offered(old):
    assert not re.search(rf"{flag(old)}(?![\w-])", selfrepair("run", "--help").out)
    assert RENAMED[old] in {option.name for option in fields(Options)}
    assert old not in {option.name for option in fields(Options)}


def test_run_without_flags_is_run_with_the_defaults_of_python(monkeypatch):
    """What reaches Python from the command line is what Python would have taken by itself."""
    given = {}

    def noted(recipe, progress, command, confirm, **choices):
        given.update(choices, recipe=recipe)
        raise UsageError("enough")

    import selfrepair_nn.running.run as room

    monkeypatch.setattr(room, "run", noted)
    assert selfrepair("run", "heads").code == 2
    assert given.pop("recipe") == "heads"
    assert Options(**given) == Options()


def test_run_does_what_python_does(tmp_path, model, prompts):
    flags = "--layers 1: --ablation mean --mean-prompts 4 --target raw --value-bias head --freeze downstream"
    flags += " --components top --share 0.1 --dtype float64 --batch-size 4 --tokens-per-pass 100 --skip-check"
    places = ["--model", str(model), "--prompts", str(prompts)]
    ended = selfrepair("run", "heads", *places, *flags.split(), "--out", tmp_path / "c.zarr")
    assert ended.code == 0, ended.err
    sr.run(
        "heads",
        model=str(model),
        prompts=str(prompts),
        layers="1:",
        ablation="mean",
        mean_prompts=4,
        target="raw",
        value_bias="head",
        freeze="downstream",
        components="top",
        share=0.1,
        dtype="float64",
        batch_size=4,
        tokens_per_pass=100,
        check=False,
        out=tmp_path / "p.zarr",
    )
    assert_same_numbers(tmp_path / "c.zarr", tmp_path / "p.zarr")
    command, python = (xr.open_zarr(tmp_path / name).attrs for name in ("c.zarr", "p.zarr"))
    assert command["settings"] == python["settings"]
    assert shlex.split(command["command"])[:3] == ["selfrepair", "run", "heads"]


def test_bare_components_means_all(tmp_path, model, prompts):
    places = ["--model", model, "--prompts", prompts, "--layers", "2"]
    for name, flags in (("bare", ["--components"]), ("all", ["--components", "all"]), ("none", [])):
        ended = selfrepair("run", "heads", *places, "--out", tmp_path / f"{name}.zarr", *flags)
        assert ended.code == 0, ended.err
    assert_same_numbers(tmp_path / "bare.zarr", tmp_path / "all.zarr")
    assert "component_change" in xr.open_zarr(tmp_path / "bare.zarr")
    assert "component_change" not in xr.open_zarr(tmp_path / "none.zarr")


def test_bare_components_does_not_swallow_the_next_flag(model, prompts):
    shown = selfrepair(
        "plan", "heads", "--components", "--layers", "2", "--model", model, "--prompts", prompts
    )
    assert shown.code == 0, shown.err
    assert re.search(r"^ablated +5,", shown.out, re.MULTILINE)


# Results, progress, exit codes


def test_the_result_is_on_stdout_and_nothing_else_is(ran):
    store, ended = ran
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.rstrip().endswith(f"store   {store}")
    assert "self-repair" in ended.out


def test_the_result_of_a_process_without_a_terminal_is_all_it_prints(tmp_path, model, prompts, ran):
    """Below Python's own streams too: no library writes a bar, a warning or a log."""
    command = ["run", "heads", "--model", model, "--prompts", prompts, "--out", tmp_path / "s.zarr"]
    ended = Process(tmp_path, *command).wait()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == ran[1].out.replace(str(ran[0]), str(tmp_path / "s.zarr"))


@pytest.mark.parametrize(("flags", "shown"), [([], True), (["--no-progress"], False)])
def test_progress_is_shown_on_a_terminal(tmp_path, model, prompts, flags, shown):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    command = [
        "run",
        "heads",
        "--model",
        model,
        "--prompts",
        prompts,
        "--batch-size",
        1,
        "--out",
        tmp_path / "s.zarr",
    ]
    with Connection(slave) as terminal:
        child = Process(tmp_path, *command, *flags, terminal=terminal)
    written = b"".join(iter(lambda: read(master), b"")).decode()
    os.close(master)
    ended = child.wait()
    assert ended.code == 0, written
    assert "store   " in ended.out
    assert ("head·tokens" in written) == shown
    assert ("100%" in written) == shown
    assert written.count("\r") < 100, "redrawn too often"


def read(descriptor):
    """What a terminal was sent; nothing once its other side is closed."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_progress_can_be_asked_for_without_a_terminal(tmp_path, model, prompts):
    command = [
        "run",
        "heads",
        "--model",
        model,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "s.zarr",
        "--progress",
    ]
    ended = selfrepair(*command)
    assert "head·tokens" in ended.err
    assert "head·tokens" not in ended.out


def test_resumed_progress_starts_where_it_stopped(tmp_path, model, prompts, monkeypatch):
    from selfrepair_nn.store import Store

    command = [
        "run",
        "heads",
        "--model",
        model,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "s.zarr",
        "--batch-size",
        3,
    ]
    write = Store.write_prompts

    def stopping(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_prompts", stopping)
        assert selfrepair(*command).code == 75
    assert re.search(r"\b50%", selfrepair(*command, "--progress").err)


def test_exit_codes(tmp_path, ran, model, prompts, monkeypatch):
    command = ["run", "heads", "--model", model, "--prompts", prompts]
    assert selfrepair("info", ran[0]).code == 0
    assert selfrepair("info", tmp_path / "nothing.zarr").code == 1
    assert selfrepair("run", "no-such-recipe").code == 2
    assert selfrepair("run").code == 2
    assert selfrepair("no-such-command").code == 2
    assert selfrepair(*command, "--no-such-flag").code == 2
    assert selfrepair(*command, "--layers", "99").code == 2

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("selfrepair_nn.running.filling.noise_floor", interrupted)
    assert selfrepair(*command, "--out", tmp_path).code == 75


def test_a_closed_pipe_is_no_error():
    """`selfrepair run --help | head -1`"""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "selfrepair_nn", "run", "--help"],
        env=os.environ | ENVIRONMENT,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert ended.stderr == b""


# Each command


def test_plan_loads_no_weights_and_writes_nothing(tmp_path, prompts, monkeypatch):
    model = saved(tmp_path / "m")
    (model / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    places = ["--model", model, "--prompts", prompts]
    shown = selfrepair("plan", "heads", *places)
    assert (shown.code, shown.err) == (0, "")
    assert selfrepair("run", "heads", "--dry-run", *places) == shown
    assert files(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_plan_says_what_run_then_does(tmp_path, model, prompts):
    choices = ["heads", "--model", model, "--prompts", prompts, "--layers", "1:", "--batch-size", 4]
    planned = selfrepair("plan", *choices, "--out", tmp_path).out.splitlines()
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in planned)
    assert lines["store"] == str(tmp_path / "heads-m-p-layers1,2.zarr")
    assert "3 layers x 5 heads" in lines["model"]
    assert lines["prompts"].startswith("6 of 7 tokens from ")
    assert lines["ablated"] == "10, resample ablation"
    assert lines["units"] == "2 of 4 prompts"
    assert lines["tokens"] == "84 clean, 420 ablated"
    assert selfrepair("run", *choices, "--out", tmp_path).code == 0
    found = xr.open_zarr(lines["store"])
    assert found.sizes == {"layer": 2, "head": 5, "prompt": 6, "position": 6}
    assert found.attrs["prompts_per_chunk"] == 4


def test_info_shows_every_variable_and_how_it_was_made(ran):
    store, _ = ran
    shown = selfrepair("info", store)
    assert (shown.code, shown.err) == (0, "")
    found = xr.open_zarr(store)
    for name, variable in found.data_vars.items():
        assert re.search(rf"^  {name} .*{re.escape(variable.description)}$", shown.out, re.MULTILINE), name
    assert found.attrs["command"] in shown.out
    assert json.loads(found.attrs["provenance"])["versions"]["torch"] in shown.out
    assert ran[1].out.split("\n\nstore")[0] in shown.out


def test_info_says_how_much_of_an_unfinished_run_is_done(tmp_path, model, prompts, monkeypatch):
    from selfrepair_nn.store import Store

    write = Store.write_prompts

    def stopping(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write_prompts", stopping)
    command = [
        "run",
        "heads",
        "--model",
        model,
        "--prompts",
        prompts,
        "--batch-size",
        3,
        "--out",
        tmp_path / "s.zarr",
    ]
    assert selfrepair(*command).code == 75
    shown = selfrepair("info", tmp_path / "s.zarr")
    assert shown.code == 0
    assert "50%" in shown.out


def test_recipes_lists_each_with_a_sentence():
    shown = selfrepair("recipes")
    assert (shown.code, shown.err) == (0, "")
    listed = dict(re.split(r" +", line, maxsplit=1) for line in shown.out.splitlines())
    assert set(listed) == set(recipe_paths())
    assert "heads" in listed
    assert all(sentence.endswith(".") for sentence in listed.values())


def test_check_passes_what_is_exact_and_fails_what_is_not(model, monkeypatch):
    shown = selfrepair("check", model)
    assert (shown.code, shown.err) == (0, "")
    marks = [line[:8].strip() for line in shown.out.splitlines()]
    assert (marks[0], {*marks}) == ("family", {"family", "", "ok"})
    assert "family  gpt2 (GPT2LMHeadModel)" in shown.out
    assert "learned positions" in shown.out
    from selfrepair_nn.models import check

    monkeypatch.setitem(check.TOLERANCE, "float32", 1e-12)
    shown = selfrepair("check", model)
    assert shown.code == 1
    assert "FAIL" in shown.out
    assert str(model) in shown.err


@pytest.mark.slow
@pytest.mark.usefixtures("hardly_written")
def test_plot_and_report_print_what_they_wrote(ran, tmp_path):
    drawn = selfrepair("plot", ran[0], "--out", tmp_path / "figures")
    assert (drawn.code, drawn.err) == (0, "")
    assert drawn.out
    assert sorted(drawn.out.split("\n")[:-1]) == sorted(map(str, (tmp_path / "figures").iterdir()))
    told = selfrepair("report", ran[0], "--out", tmp_path / "page.html")
    assert (told.code, told.out, told.err) == (0, f"{tmp_path / 'page.html'}\n", "")
    assert (tmp_path / "page.html").read_text().lower().startswith("<!doctype html")


# Light


@pytest.mark.parametrize(
    "code",
    [
        "import selfrepair_nn; dir(selfrepair_nn); selfrepair_nn.Options()",
        "from selfrepair_nn.__main__ import main",
        "import sys; sys.argv[1:] = ['--help']; from selfrepair_nn.cli import main; main()",
        "import sys; sys.argv[1:] = ['run', '--help']; from selfrepair_nn.cli import main; main()",
        "import sys; sys.argv[1:] = ['recipes']; from selfrepair_nn.cli import main; main()",
    ],
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(code):
    loaded = f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    loaded = f"import atexit, sys; atexit.register(lambda: {loaded})"
    ended = subprocess.run(
        [sys.executable, "-c", f"{loaded}\n{code}"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "[]\n")
