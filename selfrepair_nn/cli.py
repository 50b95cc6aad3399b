"""The command line: it parses, calls the public functions and prints. Every option of `run` is a field of Options."""

import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import click

from selfrepair_nn import __version__
from selfrepair_nn.completion import COMPLETED
from selfrepair_nn.ending import heard, interrupted
from selfrepair_nn.errors import Incomplete, NotAgreed, SelfRepairError
from selfrepair_nn.flags import (
    CAPTION,
    FORMAT,
    JSON,
    RECIPE,
    SIZE,
    SPLIT,
    STORE,
    STORES,
    TAIL,
    Group,
    choices,
    choices_of_a_model,
    views,
)
from selfrepair_nn.options import Options
from selfrepair_nn.shown import LOG, as_json, decoded, line, message, shown, tell

INTERRUPTED = 130
_FORMAT = warnings.formatwarning
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Found(SelfRepairError):
    """What was looked at is not as it should be: that is a result, and is on stdout already."""


def main() -> None:
    """The `selfrepair` command: a result goes to stdout, all else to stderr.

    Exit codes: 0 done, 1 failed, 2 not a valid request, 75 interrupted but resumable, 130 interrupted. With --json a
    command that has no result prints that in its place.
    """
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        vars(error)["message"] = message(error.message)
        error.show()
        _end(error.exit_code, error.format_message())
    except Incomplete as error:
        _end_resumable(error.exit_code, str(error), f"{error}:")
    except _Found as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except SelfRepairError as error:
        plan = {"plan": error.plan} if isinstance(error, NotAgreed) else {}
        if plan and not _machine():
            _print(plan["plan"])
        _say(f"error: {error}")
        _end(error.exit_code, str(error), **plan)
    except (click.Abort, KeyboardInterrupt):
        if sys.argv[1:2] in (["run"], ["audit"]):
            _end_resumable(Incomplete.exit_code, "interrupted", "interrupted; to go on:")
        interrupted()
        _say("interrupted")
        _end(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        _mute(sys.stdout)
    except OSError as error:
        said = f"{error.filename or 'the system'}: {error.strerror or error}"
        _say(message(f"error: {said}"))
        _end(1, said)
    except Exception:
        said = f"unexpected, please report it with what is in {_report()}"
        _say(said)
        _end(1, said)


def _end_resumable(code: int, said: str, above: str) -> NoReturn:
    """Leave a run that the same command goes on with."""
    interrupted()
    _say(f"{above}\n  {_command_line()}")
    _end(code, said, resume=_command_line())


def _end(code: int, said: str, **more: Any) -> NoReturn:
    """Leave without a result: a script that asked for JSON is told why as that."""
    if _machine():
        try:
            _print_json({**more, "error": message(said), "exit_code": code})
        except OSError:  # nobody reads it
            _mute(sys.stdout)
    sys.exit(code)


def _machine() -> bool:
    """Whether JSON was asked for, also in a request that is not valid."""
    return "--json" in sys.argv


def _mute(stream: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report() -> str:
    """A new file that says what happened, for whoever mends it. Keys in it are hidden."""
    import tempfile
    import traceback

    told = f"selfrepair {__version__}\n{_command_line()}\n\n{traceback.format_exc()}"
    with tempfile.NamedTemporaryFile(
        "w", prefix="selfrepair-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.write(shown(told))
    return file.name


@click.group(context_settings=HELP, cls=Group)
@click.version_option(__version__, prog_name="selfrepair")
def cli() -> None:
    """If a part of a language model is ablated: what is lost, who makes up for it, and how."""


@cli.command()
@RECIPE
@click.option("--dry-run", is_flag=True, help="Print the plan and stop, as `selfrepair plan` does.")
@click.option("--progress/--no-progress", default=None, help="Show a bar on stderr; default: on a terminal.")
@JSON
@choices
def run(recipe: str, dry_run: bool, progress: bool | None, machine: bool, **chosen: Any) -> None:
    """Run RECIPE (a name, or the path of your own .py) and print a summary of its store.

    Running the same command again resumes it, or prints the summary of what is there.
    """
    if dry_run:
        _plan(recipe, chosen, calibrate=False, machine=machine)
        return
    for number in heard():
        signal.signal(number, _interrupt)
    _knock(recipe, chosen)
    if progress or (progress is None and sys.stderr.isatty() and LOG.isEnabledFor(logging.WARNING)):
        _say(f"{recipe}: loading torch and transformers")
    _quiet_libraries()
    from selfrepair_nn.recipe import find_recipe
    from selfrepair_nn.running.run import run as run_recipe
    from selfrepair_nn.text import summary

    confirm = _confirm if sys.stdin.isatty() else None
    dataset = run_recipe(recipe, progress=progress, command=_command_line(), confirm=confirm, **chosen)
    store, found = dataset.encoding["source"], summary(dataset)
    if machine:
        _print_json({"store": store, **_about(dataset), **_summed_up(found)})
    else:
        _print(found)
        _print(f"\nstore   {store}")
    if recipe.endswith(".py") and find_recipe(recipe).drawings:
        tell(f"its figures: {shlex.join(['selfrepair', 'plot', store, '--recipe', recipe])}")


@cli.command()
@RECIPE
@click.option("--calibrate", is_flag=True, help="Run a few small jobs and estimate how long it takes.")
@JSON
@choices
def plan(recipe: str, calibrate: bool, machine: bool, **chosen: Any) -> None:
    """Print what `run` would do and cost. Nothing is written, and without --calibrate no weights are loaded."""
    _plan(recipe, chosen, calibrate, machine)


@cli.command()
@click.argument("model", shell_complete=COMPLETED["model"])
@click.option(
    "--small",
    type=float,
    default=0.1,
    show_default=True,
    help="Not masked is a head whose self-repair is surely below this part of what was removed.",
)
@click.option("--progress/--no-progress", default=None, help="Show a bar on stderr; default: on a terminal.")
@JSON
@choices_of_a_model
def audit(model: str, small: float, progress: bool | None, machine: bool, **chosen: Any) -> None:
    """Say of each of MODEL's --heads whether what its ablation shows is masked by self-repair.

    Ablates them on --prompts, as `selfrepair run heads` does, into a store that the same command resumes; of a store in
    MODEL's place nothing is run. Exit code 0 whatever is found.
    """
    for number in heard():
        signal.signal(number, _interrupt)
    if not model.rstrip("/").endswith(".zarr"):
        _knock("heads", {**chosen, "model": model})
    _quiet_libraries()
    from selfrepair_nn.auditing import audit as look

    confirm = _confirm if sys.stdin.isatty() else None
    found = look(model, small=small, progress=progress, command=_command_line(), confirm=confirm, **chosen)
    told = {name: found.attrs[name] for name in ("answer", "store")}
    if machine:
        _print_json({**told, "heads": found.records(), "notes": [*found.attrs["above"], *found.attrs["below"]]})
    else:
        _print(found)
        _print(f"\nstore   {told['store']}")


@cli.command()
@STORES
@click.option(
    "--out", default=None, help="Directory for the figures; default: the first store's name without .zarr."
)
@FORMAT
@SIZE
@CAPTION
@JSON
@views
def plot(
    stores: tuple[str, ...],
    out: str | None,
    machine: bool,
    names: tuple[str, ...],
    layers: str | None,
    heads: str | None,
    recipe: str | None,
    **shown_as: Any,
) -> None:
    """Draw the figures of one or several STORES as PNG and SVG, and print their paths.

    They are those that the first store's recipe names; where it says of none, all that suit it.
    """
    from selfrepair_nn.figures import beside, own
    from selfrepair_nn.figures import plot as draw

    datasets, found = _chosen(stores, layers, heads, names, recipe)
    wanted = names or (own(datasets[0], found) if shown_as["outcome"] == "logit" else None)
    _wrote(machine, draw(datasets, out or beside(datasets[0]), wanted, recipe=recipe, **shown_as))


@cli.command()
@STORES
@click.option("--out", default=None, help="File to write; default: beside the first store, ending in .html.")
@SIZE
@CAPTION
@JSON
@views
def report(
    stores: tuple[str, ...],
    out: str | None,
    machine: bool,
    names: tuple[str, ...],
    layers: str | None,
    heads: str | None,
    recipe: str | None,
    **shown_as: Any,
) -> None:
    """Write one HTML page about one or several STORES: figures, tables and where the numbers come from."""
    from selfrepair_nn.report import report as write

    datasets, _ = _chosen(stores, layers, heads, names, recipe)
    _wrote(machine, [write(datasets, out, recipe=recipe, names=names or None, **shown_as)])


def _chosen(
    stores: Sequence[str], layers: str | None, heads: str | None, names: tuple[str, ...], recipe: str | None
) -> tuple[list[Any], Any]:
    """Stores, of these layers and heads alone, and the recipe whose figures are drawn; the figures' names are ones."""
    from selfrepair_nn.analysis import only
    from selfrepair_nn.figures import require_figures
    from selfrepair_nn.recipe import find_recipe
    from selfrepair_nn.store import open_store

    found = None if recipe is None else find_recipe(recipe)
    require_figures(names, found)
    datasets = [open_store(path) for path in stores]
    _note_mixed(datasets)
    return [only(ds, layers, heads) for ds in datasets] if layers or heads else datasets, found


def _note_mixed(datasets: Sequence[Any]) -> None:
    """Say on stderr which stores are of other models than others of the same name."""
    from selfrepair_nn.models.alike import mixed

    for said in mixed(datasets):
        tell(said)


@cli.command()
@STORES
@click.option("--out", default=None, help="File to write; default: beside the first store, -explorer.html.")
@click.option(
    "--share",
    type=float,
    help="Top share of tokens, by direct effect; default: 0.02, or 1 where not all count.",
)
@click.option("--serve", is_flag=True, help="Serve it too, on this machine alone, until interrupted.")
@click.option("--port", type=int, default=0, show_default=True, help="Port to serve at; 0: one that is free.")
@JSON
def view(
    stores: tuple[str, ...], out: str | None, share: float | None, serve: bool, port: int, machine: bool
) -> None:
    """Write one HTML page to look at STORE: its heads, their tokens, the text, who repairs what.

    Of several STORES two stand side by side, and the page lets choose which. It needs no network, and no server.
    """
    from selfrepair_nn.explorer import server_at
    from selfrepair_nn.explorer import view as write
    from selfrepair_nn.store import open_store

    server = server_at(port, serve)
    datasets = [open_store(path) for path in stores]
    _note_mixed(datasets)
    page = write(datasets, out, share=share)
    told = {"address": server.address} if server else {}
    _wrote(machine, [page], **told)
    if server:
        server.run(page, lambda _: None)


@cli.command("compare-paper")
@STORE
@click.option("--reference", default=None, help="Model of the paper to compare with; default: STORE's own.")
@click.option(
    "--out", default=None, help="Directory for the figure; default: the store's name without .zarr."
)
@JSON
def compare_paper(store: str, reference: str | None, out: str | None, machine: bool) -> None:
    """Print STORE's means of each layer beside those that the paper's authors published, and draw both."""
    from selfrepair_nn.analysis import compare_paper as compared
    from selfrepair_nn.figures import beside, paper_comparison, save
    from selfrepair_nn.store import open_store
    from selfrepair_nn.table import of_grid
    from selfrepair_nn.text import comparison

    dataset = open_store(store)
    if not machine:
        _print(comparison(dataset, reference))
        click.echo()
    paths = save(paper_comparison.draw(dataset, reference=reference), out or beside(dataset), "paper_comparison")
    found = compared(dataset, reference)
    _wrote(machine, paths, store=store, reference=found.attrs["reference"], means=of_grid(found, "source", "layer"))


@cli.command()
@STORE
@click.option("--model", default=None, help="The model STORE is of; default: the name that it has.")
@click.option(
    "--small",
    type=float,
    default=0.5,
    show_default=True,
    help="A head is missed if its attributed effect is surely below this part of what was removed.",
)
@click.option(
    "--out", default=None, help="Directory for the figure; default: the store's name without .zarr."
)
@JSON
def attribution(store: str, model: str | None, small: float, out: str | None, machine: bool) -> None:
    """Set attribution patching, which takes the model as linear, against STORE's exact effects of every head.

    Prints the heads that it misses, with what their exact effect is made of, and draws both.
    """
    _quiet_libraries()
    from selfrepair_nn.figures import attribution as figure
    from selfrepair_nn.figures import beside, save
    from selfrepair_nn.patching import attribution as attributed
    from selfrepair_nn.store import open_store
    from selfrepair_nn.table import of_grid
    from selfrepair_nn.text import missed

    dataset = open_store(store)
    found = attributed(dataset, model, small=small)
    if not machine:
        _print(missed(found))
        click.echo()
    paths = save(figure.draw(found), out or beside(dataset), "attribution")
    told = {name: value for name, value in found.attrs.items() if "_correlation" in name}
    _wrote(machine, paths, store=store, **told, heads=of_grid(found, "layer", "head"))


@cli.command()
@STORE
@JSON
@TAIL
@SPLIT
def info(store: str, machine: bool, **tokens: Any) -> None:
    """Print what STORE holds, how much of it is done, and where it comes from."""
    from selfrepair_nn.choosing import choose_tokens
    from selfrepair_nn.store import open_store
    from selfrepair_nn.text import summary

    dataset = open_store(store)
    found = summary(choose_tokens(dataset, **tokens))
    if machine:
        _print_json({"store": store, **_about(dataset), **_summed_up(found)})
        return
    _print(_described(dataset))
    click.echo()
    _print(found)


@cli.command()
@STORE
@JSON
def verify(store: str, machine: bool) -> None:
    """Read every file of STORE and list what is missing or damaged.

    Exit code 1 if anything is, 75 if nothing is but the run has not finished.
    """
    from selfrepair_nn.hub import at_hand
    from selfrepair_nn.integrity import contents_of
    from selfrepair_nn.integrity import verify as damaged

    path = at_hand(store)
    found, attributes = damaged(path), contents_of(path).attributes
    if machine:
        damage = [asdict(each) for each in found]
        _print_json({"store": store, "damaged": damage, "finished": "finished" in attributes})
    for each in () if machine else found:
        _print(str(each))
    remedy = f"run the command that made it:\n  {attributes.get('command', 'not recorded')}"
    if found:
        count = f"{len(found)} file{'s' * (len(found) > 1)}"
        raise _Found(f"{count} of {store!r} missing or damaged; to compute again, {remedy}")
    if not machine:
        _print(f"{store}: every file is as it was written")
    if "finished" not in attributes:
        _say(f"{store!r} is whole as far as it goes, but the run has not finished; to go on, {remedy}")
        sys.exit(Incomplete.exit_code)


@cli.command()
@STORE
@click.argument("name")
@click.option("--private", is_flag=True, help="Make a repository that only you can read, where there is none.")
@click.option("--path-in-repo", default=None, help="Where in the repository; default: the store's own name.")
@click.option("--license", default=None, help="What the card says of it, such as cc-by-4.0.")
@click.option("--as-it-is", is_flag=True, help="Publish a store that has not finished, or is damaged, too.")
@JSON
def push(store: str, name: str, machine: bool, **choices: Any) -> None:
    """Publish STORE as the dataset NAME (owner/name) of the Hugging Face Hub, with a card, and print its address.

    It is verified first. The token is HF_TOKEN, or that of `hf auth login`; it is never shown or stored.
    """
    from selfrepair_nn.publishing import push as published

    address = published(store, name, **choices)
    if machine:
        _print_json({"store": store, "address": address})
    else:
        _print(address)


@cli.command()
@JSON
def recipes(machine: bool) -> None:
    """List the recipes, one line each."""
    from selfrepair_nn.recipe import recipes as found

    if machine:
        told = ("name", "summary", "figures", "parameters", "defaults")
        _print_json([{name: getattr(each, name) for name in told} for each in found()])
        return
    for each in found():
        _print(f"{each.name:<20} {each.summary}")


@cli.command()
@click.argument("model", shell_complete=COMPLETED["model"])
@click.option("--dtype", default="float32", show_default=True, help="What the model computes in.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …, balanced.")
@click.option("--revision", default=None, help="Branch, tag or commit of a hub model.")
@JSON
def check(model: str, dtype: str, device: str, revision: str | None, machine: bool) -> None:
    """Test on a short random input whether MODEL is decomposed exactly; say what it is. Exit code 1 if not."""
    _knock("heads", {"model": model, "dtype": dtype, "device": device, "revision": revision})
    _quiet_libraries()
    from selfrepair_nn.models.load import check as measure
    from selfrepair_nn.models.load import load

    loaded = load(model, dtype=dtype, device=device, revision=revision, check=False)
    structure, findings = loaded.structure, measure(loaded)
    family = {
        "family": structure.model_type,
        "class": type(loaded.module).__name__,
        "traits": structure.traits,
    }
    if machine:
        told = [{**asdict(each), "passed": each.passed} for each in findings]
        _print_json({"model": model, **family, "findings": told})
    else:
        _print(f"family  {family['family']} ({family['class']})")
        for trait in structure.traits:
            _print(f"        {trait}")
        for each in findings:
            mark = "ok" if each.passed else "FAIL"
            _print(f"{mark:<6}  {each.name}: {each.error:.1e} of the logits' spread (limit {each.limit:g})")
    if not all(each.passed for each in findings):
        raise _Found(f"{model!r} cannot be decomposed exactly")


@cli.command()
@STORE
@click.option("--watch", "again", is_flag=True, help="Look again and again, until the run has ended.")
@JSON
def jobs(store: str, again: bool, machine: bool) -> None:
    """Print what was sent to a server for STORE: what is there and how it stands, what failed and why, bytes each way.

    With --watch a terminal is redrawn; elsewhere every change is a line, with --json one of JSON. Exit code 75 if the
    run has not finished, but nobody is at work on it, nor a server on its jobs.
    """
    if again:
        _watch(store, machine)
        return
    from selfrepair_nn.backends.ndif.history import history, told
    from selfrepair_nn.paths import local
    from selfrepair_nn.store import open_store

    run = open_store(store).attrs.get("run", "")
    if machine:
        _print_json({"store": store, **told(local(store, "store"), run)})
    else:
        _print(history(local(store, "store"), run))


@cli.command()
@click.option("--host", multiple=True, help="Address of your own NDIF server, repeatable.")
@click.option("--remote", is_flag=True, help="Look at the server that nnsight is configured for.")
@click.option("--model", default=None, help="Model whose state on the server is asked for.")
@click.option("--try", "trip", is_flag=True, help="Send the model the smallest of jobs, and say whose weights answer.")
@JSON
def doctor(host: tuple[str, ...], remote: bool, model: str | None, trip: bool, machine: bool) -> None:
    """Look at versions, settings and a server, and say what is wrong. Exit code 1 if something is."""
    _quiet_libraries()
    from selfrepair_nn.backends.ndif.doctor import doctor as look

    found = []
    for each in look(host, remote=remote, model=model, trip=trip):
        found.append(each)
        if not machine:
            mark = {True: "ok  ", False: "FAIL", None: "    "}[each.right]
            _print(f"{mark}  {line(each.what):<13} {line(each.seen)}")
    if machine:
        _print_json([asdict(each) for each in found])
    if any(each.right is False for each in found):
        raise _Found(
            f"something is wrong: see {'what is not right' if machine else 'the lines marked FAIL'}"
        )


def _watch(store: str, machine: bool) -> None:
    """How STORE's jobs stand until its run has finished, or nobody is at work on it."""
    from selfrepair_nn.backends.ndif.history import changed, watched
    from selfrepair_nn.integrity import contents_of
    from selfrepair_nn.paths import local
    from selfrepair_nn.running.holding import held
    from selfrepair_nn.store import open_store

    open_store(store)
    path = local(store, "store")
    terminal, drawn, before, text = sys.stdout.isatty() and not machine, 0, dict[str, Any](), ""
    for text, now in watched(path, held=lambda: held(path)):
        if terminal:
            click.echo(f"\x1b[{drawn}F\x1b[J" * bool(drawn) + shown(text))
            drawn = text.count("\n") + 1
        for part in [] if terminal else changed(before, now):
            if machine:
                _print_json({"store": store, **part})
            else:
                said = part["server_says"] or part["state"]
                _print("  ".join(line(each) for each in (part["part"], said, part["said"]) if each))
        before = now
    if machine:
        _print_json({"store": store, "jobs": before["jobs"], "finished": before["finished"]})
    elif not terminal:
        _print(text.splitlines()[-2] if before["jobs"] else text)
    if not before["finished"]:
        remedy = f"run the command that made it:\n  {contents_of(path).attributes.get('command', 'not recorded')}"
        _say(f"no run is at work on {store!r}, which has not finished; to go on, {remedy}")
        sys.exit(Incomplete.exit_code)


def _knock(recipe: str, chosen: dict[str, Any]) -> None:
    """Refuse what can be refused before the libraries are imported, which takes seconds."""
    from selfrepair_nn.door import requested

    requested(recipe, Options(**chosen))


def _plan(recipe: str, chosen: dict[str, Any], calibrate: bool, machine: bool) -> None:
    from selfrepair_nn.recipe import renamed

    _knock(recipe, chosen)
    if told := renamed(recipe):
        tell(told)
    _quiet_libraries()
    from selfrepair_nn.estimating.preview import preview, preview_text

    found = preview(recipe, calibrate=calibrate, **chosen)
    if machine:
        _print_json(found)
    else:
        _print(preview_text(found))


def _about(dataset: Any) -> dict[str, Any]:
    """A store for a script: its attributes, those in JSON as what they say, its dimensions and its variables."""
    variables = {
        name: {
            "dims": each.dims,
            **{key: each.attrs.get(key) for key in ("units", "long_name", "description")},
        }
        for name, each in dataset.data_vars.items()
    }
    attributes = {name: decoded(value) for name, value in dataset.attrs.items()}
    return {"attributes": attributes, "sizes": dataset.sizes, "variables": variables}


def _summed_up(found: Any) -> dict[str, Any]:
    """A summary for a script."""
    return {"summary": found.records(), "notes": [*found.attrs["above"], *found.attrs["below"]]}


def _confirm(plan: str) -> bool:
    click.echo(shown(plan), err=True)
    return click.confirm("Start this remote run?", err=True)


def _described(dataset: Any) -> str:
    fields = (
        "title",
        "command",
        "created",
        "finished",
        "backend",
        "dtype",
        "target",
        "value_bias",
        "freeze",
        "fingerprint",
    )
    lines = [f"{name:<12}{line(dataset.attrs[name])}" for name in fields if name in dataset.attrs]
    if "greeting" in dataset.attrs:
        from selfrepair_nn.models.greeting import described, kept

        known = kept(dataset.attrs["greeting"])
        said = described(known) if known else "not known: what is said of it (greeting) was changed by other hands"
        lines.append(f"{'model':<12}{line(said)}")
    sizes = ", ".join(f"{name} {size}" for name, size in dataset.sizes.items())
    lines.append(f"{'dimensions':<12}{line(sizes)}")
    provenance = json.loads(dataset.attrs.get("provenance", "{}"))
    versions = line(", ".join(f"{name} {v}" for name, v in provenance.get("versions", {}).items()))
    lines += [f"{'made with':<12}{versions}", "", "variables"]
    lines += [
        f"  {line(name):<24}{line(variable.attrs.get('units', '')):<7}{line(variable.attrs.get('description', ''))}"
        for name, variable in dataset.data_vars.items()
    ]
    return "\n".join(lines)


def _command_line() -> str:
    return shlex.join(["selfrepair", *sys.argv[1:]])


def _print(text: object) -> None:
    """A result, on stdout. What is in it may have been written by others."""
    click.echo(shown(text))


def _wrote(machine: bool, paths: Sequence[Any], **told: Any) -> None:
    """The files that a command wrote; for a script with what else there is to tell."""
    if machine:
        _print_json({**told, "files": [*map(str, paths)]})
    else:
        for path in (*paths, *([told["address"]] if "address" in told else [])):
            _print(path)


def _print_json(value: Any) -> None:
    click.echo(as_json(value))


def _say(text: str) -> None:
    try:
        click.echo(f"selfrepair: {shown(text)}", err=True)
    except OSError:  # the terminal was closed
        _mute(sys.stderr)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class _Record(logging.LogRecord):
    """What a library logs; servers' words may be in it."""

    def getMessage(self) -> str:
        return shown(super().getMessage())


def _warning(*parts: Any, **more: Any) -> str:
    return shown(_FORMAT(*parts, **more))


def _quiet_libraries() -> None:
    """Only what the user can act on, filtered; loading bars only on a terminal, and not with --quiet."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bars = sys.stderr.isatty() and LOG.isEnabledFor(logging.WARNING)
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging as library

    library.set_verbosity_error()
    if not bars:
        library.disable_progress_bar()
