"""What a run was asked for, in words: its store's name, and how it differs from the run that a store holds."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from selfrepair_nn.components import Head, select_heads
from selfrepair_nn.corpora import SAMPLE, is_texts
from selfrepair_nn.errors import StoreError
from selfrepair_nn.options import Options, current
from selfrepair_nn.paths import local
from selfrepair_nn.prompts import DEFAULT_LENGTH, DEFAULT_TOKENS, SAMPLE_TOKENS
from selfrepair_nn.quantities import usual_share
from selfrepair_nn.recipe import RENAMED, Recipe, present_name

LONGEST = 100
"""Bytes of a store's name without its ending: with a lock or a draft beside it, every file system takes it."""

BARE = ("prompts", "ablation", "target", "select", "dtype")
"""Options whose values say by themselves, in a name, what they are."""

Choices = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What of a model decides how choices read: layers, heads in each, and the longest prompt, if there is a limit."""

    n_layers: int
    n_heads: int
    max_length: int | None


def choices(options: Options, sizes: Sizes) -> Choices:
    """Every choice that numbers depend on, in the one form that its spellings have in common; JSON-able.

    `options` are as a recipe resolves them; its parameters stand beside them by name. None: left open.

    Raises:
        UsageError: layers or heads that the model does not have.
    """
    found = {each.name: getattr(options, each.name) for each in fields(options) if each.metadata["decides"]}
    del found["model"]
    usual = "all" if options.until_ci is None else "top-share"
    found |= {
        "prompts": _told(options.prompts),
        "partners": _told(options.partners),
        "share": usual_share(_all_count(options.prompts)) if options.share is None else options.share,
        "tokens": _tokens(options),
        "length": _length(options, sizes),
        "rows_are": None if _ready(options.prompts) else options.rows,
        "layers": _layers(options.layers, sizes),
        "heads": _heads(options.heads, sizes),
        "select": None if options.select == usual else options.select,
        "remote": options.served,
    }
    return json.loads(json.dumps(found | found.pop("param"), default=str))


@dataclass(frozen=True)
class Request:
    """A recipe with options as it resolves them, for a model of some sizes: what is asked for, and where it goes.

    `dtype` is what the model computes in, whatever the options say: one that is handed in, or served, has its own.
    """

    recipe: Recipe
    options: Options
    model: str
    sizes: Sizes
    dtype: str

    @cached_property
    def choices(self) -> Choices:
        dtype = None if self.options.served else self.dtype
        return self._choices(self.options) | {"dtype": dtype}

    @cached_property
    def usual(self) -> Choices:
        """The choices where nothing is asked for, but of the same prompts: how many tokens are usual is theirs."""
        prompts = self.options.prompts
        rows: Any = self.options.rows_are if _ready(prompts) else None
        same = Options(prompts=prompts, rows_are=rows)
        return self._choices(self.recipe.resolved(same)) | {"prompts": SAMPLE}

    def _choices(self, options: Options) -> Choices:
        """Which share is usual for prompts of the recipe's own is not known before they are made: it is left open."""
        found = choices(options, self.sizes)
        return found | ({"share": options.share} if self.recipe.make_prompts else {})

    @cached_property
    def name(self) -> str:
        """RECIPE-MODEL.zarr, with each choice that is not the usual one; the last as a hash where they are many."""
        return self._name(self.recipe.name)

    def _name(self, recipe: str) -> str:
        base = _safe(f"{recipe}-{Path(self.model).name.removesuffix('.gguf')}")
        other = {n: v for n, v in self.choices.items() if v != self.usual.get(n) and v is not None}
        parts = [_safe(_part(name, value)) for name, value in other.items()]
        name = "-".join([base, *parts])
        if len(name.encode()) > LONGEST:
            mark = sha256(json.dumps([base, other]).encode()).hexdigest()[:8]
            while parts and len("-".join([base, *parts, mark]).encode()) > LONGEST:
                parts.pop()
            name = "-".join([base.encode()[: LONGEST - len(mark) - 1].decode(errors="ignore"), *parts, mark])
        return f"{name}.zarr"

    @cached_property
    def path(self) -> Path:
        """The store: `out`, if that ends in .zarr, or of the default name in that directory.

        One that was begun under a former name of the recipe goes on where it is.
        """
        out = local(self.options.out, "out")
        if out.suffix == ".zarr":
            return out
        former = (out / self._name(name) for name, now in RENAMED.items() if now == self.recipe.name)
        own = out / self.name
        return next((place for place in former if place.exists() and not own.exists()), own)

    def differences(self, attributes: Mapping[str, Any]) -> list[str]:
        """ "tokens 16384 there, 2048 here" for each choice that a store, with these attributes, was not made with.

        Raises KeyError for a store that does not say what was chosen: one that is older.
        """
        there = {"recipe": present_name(attributes.get("recipe")), "model": attributes.get("model")}
        there |= current(json.loads(attributes["options"]))
        here = {"recipe": self.recipe.name, "model": self.model} | self.choices
        pairs = {n: (there.get(n, self.usual.get(n)), here.get(n)) for n in dict.fromkeys([*here, *there])}
        return [f"{name} {_word(a)} there, {_word(b)} here" for name, (a, b) in pairs.items() if a != b]

    def refusal(self, said: list[str]) -> StoreError:
        """What a user reads where the path holds another run: in what it differs, and where this one can go."""
        stem = self.name.removesuffix(".zarr")
        tried = (self.path.with_name(f"{stem}{'' if n == 1 else f'-{n}'}.zarr") for n in count(1))
        free = next(place for place in tried if not place.exists())
        return StoreError(
            f"{str(self.path)!r} holds another run ({'; '.join(said)}): choose another --out, "
            f"free is --out {quote(str(free))}"
        )


def _word(value: Any) -> str:
    text = "left open" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:20]} … {text[-36:]}"


def _part(name: str, value: Any) -> str:
    """How a choice reads in a name."""
    if name == "prompts":
        return Path(value.partition(":")[0]).stem if os.sep in value or "." in value else value
    if name in BARE:
        return value
    if value is True:
        return name
    if name in ("layers", "heads"):
        ranges = re.sub(r"(\d+):(\d+)", lambda m: f"{m[1]}-{int(m[2]) - 1}", value)
        return name + ranges.replace("*", "all")
    if name == "partners":
        value = Path(value).stem
    label, text = name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{label}{text}" if text[:1].isdigit() else f"{label}-{text}"


def _safe(text: str) -> str:
    """Letters that every file system takes, and that a terminal shows."""
    kept = re.sub(r'[/\\:*?"<>|\s]+', "_", "".join(c if c.isprintable() else "_" for c in text))
    return kept.strip(".") or "_"


def _ready(prompts: Any) -> bool:
    """Whether prompts are token ids already, whose number and length are their own."""
    return str(prompts).lower().endswith(".npy") if isinstance(prompts, str) else not is_texts(prompts)


def _all_count(prompts: Any) -> bool:
    """Whether every token counts: only `Prompts` can say that some do not."""
    return getattr(prompts, "all_count", True)


def _tokens(options: Options) -> int | None:
    source = options.prompts
    if (
        options.tokens
        or _ready(source)
        or isinstance(source, tuple)
        or os.path.isfile(os.path.expanduser(source))
    ):
        return options.tokens
    return SAMPLE_TOKENS if source == SAMPLE else DEFAULT_TOKENS


def _length(options: Options, sizes: Sizes) -> int | None:
    """Of ready rows, and of texts, the longest decides where nobody does."""
    if _ready(options.prompts) or options.rows == "texts":
        return options.length
    return options.length or min(DEFAULT_LENGTH, sizes.max_length or DEFAULT_LENGTH)


def _layers(spec: str | None, sizes: Sizes) -> str | None:
    """The selected layers in order, "0,5:8": a list, a range and negative numbers of the same ones read alike."""
    if spec is None:
        return None
    layers = sorted({head.layer for head in select_heads(spec, None, sizes.n_layers, sizes.n_heads)})
    begins = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer - 1]
    runs = [layers[a:b] for a, b in zip(begins, [*begins[1:], len(layers)], strict=True)]
    return ",".join(f"{r[0]}:{r[-1] + 1}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)


def _heads(spec: str | None, sizes: Sizes) -> str | None:
    """The named heads in order, "9.6,10.*"."""
    if spec is None:
        return None
    heads = select_heads(None, spec, sizes.n_layers, sizes.n_heads)
    every = [n for n in range(sizes.n_layers) if {Head(n, h) for h in range(sizes.n_heads)} <= {*heads}]
    return ",".join(dict.fromkeys(f"{h.layer}.{'*' if h.layer in every else h.head}" for h in heads))


def _told(source: Any) -> str | None:
    """Prompts or partners as text: a path or name as it is, anything else by a hash of what it holds."""
    if source is None or isinstance(source, str):
        return source
    if isinstance(source, tuple) and not is_texts(source):
        return f"ids_{_digest(json.dumps(source).encode())}"
    if isinstance(source, tuple):
        return f"texts_{_digest(json.dumps(source).encode())}"
    if hasattr(source, "sha256"):
        return f"prompts_{source.sha256[:8]}"
    return f"ids_{_digest(str(np.shape(source)).encode() + np.ascontiguousarray(source).tobytes())}"


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:8]
