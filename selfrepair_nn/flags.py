"""What commands have in common: the options of a run, those of what is shown of a store, and how much is told."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, get_args

import click

from selfrepair_nn.completion import COMPLETED
from selfrepair_nn.options import RENAMED, Options, flag, renamed
from selfrepair_nn.quantities import OUTCOMES
from selfrepair_nn.shown import LEVELS, telling

JSON = click.option("--json", "machine", is_flag=True, help="Print the result as JSON, for a script.")
RECIPE = click.argument("recipe", shell_complete=COMPLETED["recipe"])
STORE = click.argument("store", type=click.Path())
STORES = click.argument("stores", nargs=-1, required=True, type=click.Path())
TAIL = click.option(
    "--tail",
    type=click.Choice(["top", "bottom", "absolute"]),
    help="Which share of a head's tokens, by direct effect: the highest, the lowest (written against the target), or "
    "the largest of either sign; default: top.",
)
SPLIT = click.option(
    "--split-selection",
    is_flag=True,
    default=None,
    help="Select tokens and heads on half of the documents, report on the other half.",
)
AGAINST = click.option(
    "--against",
    type=click.Choice(["removed", "direct-effect"]),
    help="What logit changes are set against: what the ablation took of the direct effect, or all of that, as in the "
    "paper; default: removed, but for zero ablation.",
)
OF_FIGURES = (
    click.option(
        "--figure",
        "names",
        multiple=True,
        shell_complete=COMPLETED["names"],
        help="Figure to draw, repeatable; default: the store's own.",
    ),
    click.option(
        "--share",
        type=float,
        help="Top share of tokens, by direct effect; default: 0.02, or 1 where not all count.",
    ),
    click.option(
        "--outcome",
        type=click.Choice(tuple(OUTCOMES)),
        default="logit",
        show_default=True,
        help="What is drawn: logits, or log-probability in nats, of stores that hold it (run --logprob).",
    ),
    click.option("--recipe", default=None, help="Your recipe's .py, if it defines figures of its own."),
    click.option(
        "--layers",
        default=None,
        shell_complete=COMPLETED["layers"],
        help="Show only these layers: 8:12 or 0,5,-1; default: all.",
    ),
    click.option(
        "--heads",
        default=None,
        shell_complete=COMPLETED["heads"],
        help="Show only these heads: 9.6,10.*; default: all.",
    ),
    TAIL,
    SPLIT,
    AGAINST,
)
"""Of what is drawn."""

FORMAT = click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["png", "svg", "pdf"]),
    default=("png", "svg"),
    help="Kind of file to write, repeatable; default: png and svg.",
)
SIZE = click.option(
    "--size", default=None, help="Width and height of each figure in inches, such as 6.4x4.2."
)
CAPTION = click.option("--caption/--no-caption", default=True, help="Small print below; default: with it.")


class Command(click.Command):
    """A command, with the options that all have: how much is told on stderr."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        quiet = click.Option(["-q", "--quiet"], is_flag=True, help="Print the result, and errors alone.")
        level = click.Option(
            ["--log-level"],
            type=click.Choice(LEVELS),
            help="Tell what is at least so important; default: warning, or SELFREPAIR_LOG_LEVEL.",
        )
        self.params += [quiet, level]

    def invoke(self, ctx: click.Context) -> Any:
        quiet, level = ctx.params.pop("quiet"), ctx.params.pop("log_level")
        with telling("error" if quiet else level):
            return super().invoke(ctx)


class Group(click.Group):
    command_class = Command


def choices(command: Callable, but: tuple[str, ...] = ()) -> Callable:
    """Give a command one option for each field of Options `but` these, and one that is not shown for each old name."""

    @wraps(command)
    def called(**given: Any) -> None:
        command(**renamed(given))

    offered = {each.name: each for each in fields(Options)}
    for old, new in RENAMED.items():
        called = click.option(flag(old), old, type=_kind(offered[new]), hidden=True)(called)
    for each in reversed([each for name, each in offered.items() if name not in but]):
        called = _click_option(each)(called)
    return called


def choices_of_a_model(command: Callable) -> Callable:
    """The same for a command whose argument is the model."""
    return choices(command, but=("model",))


def _kind(each: Any) -> type:
    """What click reads of an option: a number, or a text."""
    kinds = [k for k in get_args(each.type) or (each.type,) if k in (int, float)]
    return kinds[0] if kinds else str


def _click_option(each: Any) -> Callable:
    written = flag(each.name)
    shared = {
        "default": each.default,
        "help": each.metadata["help"],
        "show_default": each.default is not None,
    }
    shared["shell_complete"] = COMPLETED.get(each.name)
    if isinstance(each.default, tuple):
        return click.option(
            written, each.name, multiple=True, default=each.default, help=each.metadata["help"]
        )
    if each.type is bool:
        names = f"{written}/--skip-{each.name}" if each.default else written
        return click.option(names, each.name, is_flag=True, **shared | {"show_default": each.default})
    if each.metadata["choices"]:
        alone = {"is_flag": False, "flag_value": each.metadata["alone"]} if each.metadata["alone"] else {}
        return click.option(
            written, each.name, type=click.Choice(each.metadata["choices"]), **shared, **alone
        )
    return click.option(written, each.name, type=_kind(each), **shared)


def views(command: Callable) -> Callable:
    """Give a command the options of what a figure or a page shows of a store."""
    for each in reversed(OF_FIGURES):
        command = each(command)
    return command
