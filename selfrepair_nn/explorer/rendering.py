"""The page of the explorer: one template, one style and a script of several files, with the data of the stores."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

PACKAGE = "selfrepair_nn.explorer"
SCRIPTS = ("data.js", "parts.js", "heads.js", "tokens.js", "pane.js")
STYLES = ("body.css", "explorer.css", "report.css")

FILES = ("page.html.j2", *SCRIPTS, *STYLES)


def page(stores: Sequence[Mapping[str, Any]], title: str | None = None, head: str = "", rest: str = "") -> str:
    """The page of the data of one store, or of several side by side (`contents.Contents`); of none, without explorer.

    `head` and `rest` are what stands before and after it, safe markup; `title` is what the browser calls the page.
    """
    called = title or " and ".join(each["name"] for each in stores)
    style, script = joined(STYLES), f'"use strict";\n{joined(SCRIPTS)}'
    parts = {"stores": stores, "title": called, "policy": policy(style, script)}
    parts |= {
        name: Markup(text)
        for name, text in {"style": style, "script": script, "head": head, "rest": rest}.items()
    }
    return environment().get_template("page.html.j2").render(parts)


def policy(style: str, script: str) -> str:
    """What a browser is told: nothing but these runs here, and nothing is loaded or sent."""
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def environment() -> Environment:
    """Of all templates: what is not made here is escaped, whoever wrote it."""
    return Environment(loader=PackageLoader(PACKAGE, ""), autoescape=True, undefined=StrictUndefined)


def joined(names: Iterable[str]) -> str:
    """Files of ours, one after the other."""
    return "\n".join((files(PACKAGE) / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    """How a policy names what a page may hold."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
