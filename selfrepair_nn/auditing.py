"""Is what an ablation shows masked by self-repair? One call for a list of heads, wherever the model is."""

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Unpack

import numpy as np
import xarray as xr

from selfrepair_nn import values
from selfrepair_nn.analysis import (
    AMPLIFIED,
    HALF_WIDTH,
    MASKED,
    PLAIN,
    SMALL,
    UNKNOWN,
    masking,
    only,
    percent,
    restored,
)
from selfrepair_nn.components import Head, select_heads
from selfrepair_nn.confidence import RATE
from selfrepair_nn.errors import UsageError
from selfrepair_nn.given import Given
from selfrepair_nn.options import Options
from selfrepair_nn.running.run import run
from selfrepair_nn.shown import tell
from selfrepair_nn.store import open_store
from selfrepair_nn.table import Summary
from selfrepair_nn.wording import (
    WIDTH,
    basis,
    counted,
    each_heads,
    intervals,
    legible,
    noise,
    number,
    reach,
    task,
    title,
    warnings,
    worst_closure,
)

SPLIT = ("from_heads", "from_mlps", "from_components", "from_mixers", "from_post_norms", "from_norm")
TOLD = ("direct_effect", "removed", "logit_change", "self_repair", *SPLIT, "share_repaired")
NAMES = {
    "from_heads": "other heads",
    "from_mlps": "MLPs",
    "from_components": "all other components",
    "from_mixers": "mixers",
    "from_post_norms": "the norms behind attention",
    "from_norm": "the final norm",
}
SAID = {
    MASKED: "masked by self-repair",
    AMPLIFIED: "amplified",
    PLAIN: "not masked",
    UNKNOWN: "cannot be told",
}
SAID_OF_ONE = {
    MASKED: "What ablating {} shows is masked by self-repair",
    AMPLIFIED: "What ablating {} shows is amplified: more is lost than was taken",
    PLAIN: "What ablating {} shows is not masked by self-repair",
    UNKNOWN: "Whether what ablating {} shows is masked by self-repair cannot be told",
}
OF_STORES = ("layers", "heads", "share")
OF_SHARES = ("select", "until_ci", "components", "logprob", "words")
"""Choices of a run in which its share decides; else only what is told of it afterwards."""


def audit(
    audited: Any = None,
    /,
    *,
    small: float = SMALL,
    progress: bool | None = None,
    command: str = "",
    confirm: Callable[[str], bool] | None = None,
    **choices: Unpack[Given],
) -> Summary:
    """Whether what each head's ablation shows is masked by self-repair, with the exact split: a frame, one row a head.

        sr.audit("tiny-neox", heads="6.1,7.5", tokens=4096)
        sr.audit(model, heads=["a9.h6", "blocks.9.attn.hook_z[9]"], prompts=my_prompts)
        sr.audit("meta-llama/Llama-3.1-8B", heads=[(30, 1)], remote=True, tokens=20000)

    Runs the recipe `heads` for these heads, or resumes it, and keeps its store as `run` does. Means are over each
    head's top share of tokens by direct effect, or over the tokens that count where the prompts say which do.

    - index `head`: L9H6; `verdict`: "masked", "amplified", "not masked" or "cannot be told", as `masking` defines them;
    - direct_effect, removed, logit_change, self_repair, the parts that add up to it (from_heads, from_mlps, from_norm
      and what else the model has), share_repaired (self_repair / removed): means, in logits but for the last, each with
      the ends of its 95% interval, x_low and x_high (None where there is none), clustered by document;
    - masking_q_value, small_q_value: what the verdict rests on; tokens: how many the means are over; `says`: in words.

    Printed, it is a text; `records()` gives plain dicts. `attrs["answer"]` is one sentence over all heads,
    `attrs["store"]` the store's path.

    Args:
        audited: the model, as `model` of `run` (then it is not given twice); or a store of single heads, or its path,
            of which nothing is run, and only layers, heads and share may be chosen.
        small: self-repair that surely is less than this part of what was removed masks nothing.
        progress: as in `run`.
        command: as in `run`.
        confirm: as in `run`.
        choices: the options of a run: heads, prompts, tokens, ablation, host …

    Raises:
        UsageError: as in `run` and `masking`; several revisions, or a choice that does not go with a store.
        NotAgreed, StoreError, Incomplete, Fault: as in `run`.
    """
    if (stored := _stored(audited)) is not None:
        _require_of_store(choices)
        heads = choices.get("heads")
        heads = heads if heads is None else values.heads("heads", heads)
        ds = only(stored, choices.get("layers"), heads)
        if heads is not None:
            _tell_lacking(ds, heads)
    else:
        ds = run("heads", progress=progress, command=command, confirm=confirm, **_options(audited, choices))
    return told(ds, choices.get("share"), small)


def _stored(audited: Any) -> xr.Dataset | None:
    if isinstance(audited, xr.Dataset):
        return audited
    path = os.fspath(audited) if isinstance(audited, str | os.PathLike) else ""
    return open_store(path) if path.rstrip("/").endswith(".zarr") else None


def _tell_lacking(ds: xr.Dataset, heads: str) -> None:
    """Tell of heads that are named, and of which the store holds nothing."""
    layers, n = (int(ds.attrs.get(f"n_{name}s", ds.sizes[name])) for name in ("layer", "head"))
    there = {Head(int(one["layer"]), int(one["head"])) for one in _each(ds)}
    if lacking := [head.label for head in select_heads(None, heads, layers, n) if head not in there]:
        tell(f"the store holds nothing of {_listed(lacking)}: audit the model for that")


def _require_of_store(choices: Any) -> None:
    plain = {name: value for name, value in choices.items() if name not in OF_STORES and value is not None}
    usual = {each.name: each.default for each in fields(Options)}
    if other := sorted(name for name, value in plain.items() if repr(value) != repr(usual.get(name))):
        raise UsageError(
            f"{other[0]} is a choice of a run, and a store is audited as it is: leave it out, or give the model"
        )


def _options(audited: Any, choices: Any) -> Any:
    """The options of the run, refused here where what they make cannot be audited."""
    if audited is not None and choices.get("model") is not None:
        raise UsageError("the model is given twice: write audit(model, …) or audit(model=…)")
    found = choices if audited is None else choices | {"model": audited}
    options = Options(**found)
    if options.revisions is not None:
        raise UsageError("an audit is of one model: give each revision by itself, revision=…, with an out of its own")
    found = found | {"prompts": options.prompts}  # what gives texts one by one has given them
    decides = any(getattr(options, name) != getattr(Options, name) for name in OF_SHARES)
    return found if decides else {name: value for name, value in found.items() if name != "share"}


def told(ds: xr.Dataset, share: Any = None, small: float = SMALL) -> Summary:
    """The frame of a store of single heads; see `audit`."""
    heads = masking(legible(restored(ds)), None if share is None else values.number("share", share), small=small)
    rows = [_row(one, heads) for one in _each(heads)]
    answer = _answer(rows, heads)
    loud = warnings(heads)
    above = [*loud, f"{title(heads)}: {basis(heads)}", *task(heads), answer]
    below = [*(row["says"] for row in rows), "", *_known(heads)]
    text = "\n".join([*_wrapped(above), "", *_table(rows), "", *_wrapped(below)])
    found = Summary.of(rows, "head", text, above, below)
    found.attrs |= {"answer": answer, "store": str(ds.encoding.get("source") or "")}
    return found


def _each(heads: xr.Dataset) -> list[xr.Dataset]:
    """Every head that was to be run, in order."""
    chosen = np.argwhere(heads.selected.values)
    return [heads.isel(layer=int(layer), head=int(head)) for layer, head in chosen]


def _row(one: xr.Dataset, heads: xr.Dataset) -> dict[str, Any]:
    label = Head(int(one["layer"]), int(one["head"])).label
    row: dict[str, Any] = {"head": label, "verdict": str(one.verdict.item())}
    for name in TOLD:
        if f"top_{name}" in one:
            mean, width = float(one[f"top_{name}"]), float(one[f"top_{name}{HALF_WIDTH}"])
            ends = {"": mean, "_low": mean - width, "_high": mean + width}
            row |= {name + end: value if np.isfinite(value) else None for end, value in ends.items()}
    row |= {name: _finite(one[name]) for name in ("masking_q_value", "small_q_value")}
    row["tokens"] = int(one.top_tokens)
    return row | {"says": _says(row, heads)}


def _finite(value: xr.DataArray) -> float | None:
    return float(value) if np.isfinite(value) else None


def _says(row: dict[str, Any], heads: xr.Dataset) -> str:
    """A head's row in one sentence, which claims what its verdict allows."""
    head, verdict, small = row["head"], row["verdict"], percent(heads.attrs["small"])
    if row["removed"] is None:
        return f"{head}: {verdict}; nothing is done yet."
    took = f"the ablation takes {_with(row, 'removed')} logits from the target"
    took += f", and it changes by {_with(row, 'logit_change')}"
    if verdict == MASKED:
        return f"{head}: masked; {took}: {_share(row)} is made up for, most by {_most(row)}."
    if verdict == AMPLIFIED:
        return f"{head}: amplified; {took}: more than was taken, most by {_most(row)}."
    if verdict == PLAIN:
        repair = _with(row, "self_repair")
        return f"{head}: not masked; {took}: self-repair is surely within {small} of what was taken, {repair}."
    return f"{head}: cannot be told; {took}: {_why(row, heads)}."


def _why(row: dict[str, Any], heads: xr.Dataset) -> str:
    """Why nothing can be told of a head."""
    if warnings(heads):
        return "but its parts do not add up"
    if row["self_repair_low"] is None:
        return f"in {counted(row['tokens'], 'token')}, {_few(heads)}"
    if row["removed_low"] <= 0 <= row["removed_high"]:
        return "but what was taken cannot be told from 0, so that nothing could be masked"
    n, small = int(heads.selected.sum()), percent(heads.attrs["small"])
    surely = "surely there" + (f", of {n} heads that are looked at," if n > 1 else "")
    return f"self-repair, {_with(row, 'self_repair')}, is neither {surely} nor surely within {small} of what was taken"


def _few(heads: xr.Dataset) -> str:
    return f"of too few {heads.attrs.get('clustered_by', 'prompt')}s for an interval"


def _with(row: dict[str, Any], name: str) -> str:
    low, mean = row[f"{name}_low"], row[name]
    return f"{number(mean)} {reach(mean - low)}" if low is not None else number(mean)


def _share(row: dict[str, Any]) -> str:
    share, low = row["share_repaired"], row["share_repaired_low"]
    return f"{share:.0%}" if low is None else f"{share:.0%} ± {share - low:.0%}"


def _most(row: dict[str, Any]) -> str:
    """The part that does most in the self-repair's direction."""
    sign = np.sign(row["self_repair"])
    name = max((name for name in SPLIT if row.get(name) is not None), key=lambda name: sign * row[name])
    return f"{NAMES[name]} ({_with(row, name)})"


def _answer(rows: Sequence[dict[str, Any]], heads: xr.Dataset) -> str:
    """All heads in one sentence, with what it rests on."""
    if warnings(heads):
        return "Nothing can be told: the parts do not add up."
    if not rows:
        return "Nothing is done yet."
    by = {v: [row["head"] for row in rows if row["verdict"] == v] for v in (MASKED, AMPLIFIED, PLAIN, UNKNOWN)}
    n, found = len(rows), {verdict: labels for verdict, labels in by.items() if labels}
    parts = [f"{len(labels)} {SAID[verdict]} ({_listed(labels)})" for verdict, labels in found.items()]
    said = f"Of {n} heads {', '.join(parts)}" if n > 1 else SAID_OF_ONE[next(iter(found))].format(rows[0]["head"])
    tokens = [row["tokens"] for row in rows]
    clusters = counted(heads.attrs.get("clusters", 0), heads.attrs.get("clustered_by", "prompt"))
    return f"{said}; on {each_heads(heads)}, {_span(tokens)}{' each' * (n > 1)}, from {clusters}."


def _listed(labels: Sequence[str], most: int = 6) -> str:
    return ", ".join([*labels[:most], *(["…"] if len(labels) > most else [])])


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return counted(high, "token") if low == high else f"{low:,} to {high:,} tokens"


def _known(heads: xr.Dataset) -> list[str]:
    rate = f"masked, amplified and not masked: each at a false discovery rate of {RATE:.0%} over these heads"
    small = f"not masked: self-repair surely within {percent(heads.attrs['small'])} of what was removed"
    return [intervals(heads), rate, small, f"{noise(heads)}, worst |closure| {worst_closure(heads)}"]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """As lines: head, what was taken and lost, the split, verdict."""
    parts = {"from_heads": "= heads", "from_mlps": "+ MLPs", "from_components": "= others", "from_mixers": "+ mixers"}
    parts |= {"from_post_norms": "+ post", "from_norm": "+ norm"}
    shown = {name: label for name, label in parts.items() if any(name in row for row in rows)}
    columns = {"removed": "removed", "logit_change": "change", "self_repair": "self-repair"} | shown
    widths = {name: 16 if name == "self_repair" else 9 for name in columns}
    every = [["head", *columns.values(), "verdict"]]
    for row in rows:
        cells = {name: number(np.nan if row[name] is None else row[name]) for name in columns}
        if row["removed"] is not None:
            cells["self_repair"] = _with(row, "self_repair")
        every.append([row["head"], *cells.values(), row["verdict"]])
    return [_line(each, [*widths.values()]) for each in every]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers, last = cells
    return f"{first:<9}{''.join(f'{cell:>{width}}' for cell, width in zip(numbers, widths, strict=True))}  {last}"


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in (textwrap.wrap(line, WIDTH) or [""])]
