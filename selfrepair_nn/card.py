"""The card of a published store: what was run on what, how well it is known, and the lines that open it.

What a store says of itself may have been written by anybody: in a card it is text, never markup.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from selfrepair_nn.hub import Address
from selfrepair_nn.provenance import PAPER
from selfrepair_nn.shown import decoded, line, shown

LONGEST = 300
_MARKUP = re.compile(r"[\\`*\[\]<>#|~@$&]|(?<!\w)_|_(?!\w)|:(?=/)|(?<=www)[.]", re.IGNORECASE)
"""What does something in Markdown, as GitHub and the hub read it: addresses become links by themselves."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOLD = {
    "model": "model",
    "recipe": "recipe",
    "ablation": "replaced by",
    "target": "target",
    "value_bias": "value bias",
    "freeze": "frozen",
    "dtype": "computed in",
    "backend": "backend",
    "created": "begun",
    "finished": "finished",
    "fingerprint": "fingerprint of the model",
}
"""Attributes that the card's table has, and what they are called there."""

CARD = Template("""---
$front---

<!-- selfrepair push $place -->

# $title

$warnings$about

| | |
|---|---|
$rows

The command that made it:

$command

What it found:

$summary

## Open it

With [xarray](https://xarray.dev) and [zarr](https://zarr.dev) alone (`pip install xarray zarr huggingface_hub`);
what is read is fetched:

$bare

With selfrepair_nn, which fetches it whole into the hub's cache, and checks it:

$ours

Every variable has `units`, `long_name` and `description`.

## Cite

$references
""")

ABOUT = (
    "Parts of a language model were ablated, and for every token is measured what each wrote to the logit of the next "
    "token, what the logit really lost, and how the difference, the self-repair, splits into the other heads, the MLPs "
    "and the final norm."
)
BARE = """import xarray as xr

dataset = xr.open_zarr({address!r})
top = dataset.counted & (dataset.direct_effect >= dataset.threshold)  # the top share of each head or case
dataset.self_repair.where(top).mean(("prompt", "position"), dtype=float)  # the paper's statistic
"""
OURS = """selfrepair info {address}
selfrepair view {address}
"""


def card(path: Path, address: Address, amiss: Sequence[str], license: str | None) -> str:
    """The card of the store at `path`; `amiss` is what is to be known first."""
    attributes, summary = _told(path)
    title = attributes.get("title", path.name)
    return CARD.substitute(
        front=_front(attributes, title, license),
        place=_marked(address),
        title=words(title),
        warnings="".join(f"**{words(each)}.**\n\n" for each in amiss),
        about=ABOUT,
        rows="\n".join(f"| {name} | {value} |" for name, value in _rows(attributes)),
        command=fenced(attributes.get("command", "not recorded"), "sh"),
        summary=fenced(summary),
        bare=fenced(BARE.format(address=str(address)), "python"),
        ours=fenced(OURS.format(address=line(str(address))), "sh"),
        references="\n".join(
            f"- {words(each, 600)}" for each in str(attributes.get("references", PAPER)).split("; ")
        ),
    )


def is_card_of(text: str, address: Address) -> bool:
    """Whether a card is one that was made of the store at this address."""
    return f"<!-- selfrepair push {_marked(address)} -->" in text


def words(text: object, longest: int = LONGEST) -> str:
    """Text for Markdown, whoever wrote it, on one line: it reads as it is, and does nothing."""
    return _MARKUP.sub(lambda mark: f"&#{ord(mark[0])};", line(text, longest))


def fenced(text: object, kind: str = "") -> str:
    """Text of several lines as a block that nothing in it ends."""
    told = shown(text).strip("\n")
    longest = max(map(len, re.findall("`+", told)), default=0)
    return f"{'`' * max(3, longest + 1)}{kind}\n{told}\n{'`' * max(3, longest + 1)}"


def _marked(address: Address) -> str:
    return words(address.path)


def _front(attributes: dict[str, Any], title: str, license: str | None) -> str:
    """The card's front matter. JSON is YAML, so nothing in a text ends it."""
    model = str(attributes.get("model", ""))
    tags = [
        "interpretability",
        "self-repair",
        "ablation",
        "language-models",
        "selfrepair_nn",
        "zarr",
        "xarray",
    ]
    told = {"pretty_name": line(title, LONGEST), "tags": tags, "viewer": False}
    told |= {"license": line(license, LONGEST)} if license else {}
    told |= {"base_model": model} if _HUB_NAME.fullmatch(model) else {}
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in told.items())


def _told(path: Path) -> tuple[dict[str, Any], str]:
    """A store's attributes, and its summary in words; of one that is damaged what can be read."""
    from selfrepair_nn.errors import SelfRepairError
    from selfrepair_nn.integrity import contents_of
    from selfrepair_nn.store import open_store
    from selfrepair_nn.text import summary

    try:
        return contents_of(path).attributes, str(summary(open_store(path)))
    except SelfRepairError as error:
        return contents_of(path).attributes, f"nothing, for it is not whole: {error}"


def _rows(attributes: dict[str, Any]) -> list[tuple[str, str]]:
    source = decoded(attributes.get("provenance", "{}"))
    source = source if isinstance(source, dict) else {}
    told = {name: attributes[each] for each, name in TOLD.items() if each in attributes}
    told |= {"revision of the model": source["revision"]} if source.get("revision") else {}
    for name, each in (("prompts", "prompts"), ("version of", "versions"), ("this package's", "git")):
        told |= {f"{name} {key}": value for key, value in _items(source.get(each))}
    return [(words(name), words(value)) for name, value in told.items()]


def _items(found: Any) -> list[tuple[str, Any]]:
    return [*found.items()] if isinstance(found, dict) else []
