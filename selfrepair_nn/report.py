"""A report of one store as one HTML file: figures, tables, how to read them, where the numbers come from.

The file needs nothing else: no network, no script, no font.
"""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from selfrepair_nn import figures, text
from selfrepair_nn.analysis import by_head, by_layer, most_repaired
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures.style import outlined_svg
from selfrepair_nn.paths import local
from selfrepair_nn.shown import line

RANKED = 10
HEAD_COLUMNS = {
    "direct effect": "top_direct_effect",
    "logit change": "top_logit_change",
    "self-repair": "top_self_repair",
    "± s.e.": "top_self_repair_se",
    "from heads": "top_from_heads",
    "from MLPs": "top_from_mlps",
    "from norm": "top_from_norm",
}
LAYER_COLUMNS = {name: key for name, key in HEAD_COLUMNS.items() if not key.endswith("_se")}
SHARES = {"norm share": "norm_share", "repaired": "top_repaired"}
"""Columns that are shares, shown as percentages."""


def render(ds: xr.Dataset, *, share: float | None = None, store: str | None = None) -> str:
    """The report of a store as HTML; `store` is its directory's name, by default where `ds` came from.

    Raises:
        UsageError: `ds` is not a store of the heads recipe, `share` is not in (0, 1], or nothing is done yet.
    """
    attributes, ds = ds.attrs, text.legible(ds)
    heads = by_head(ds, share)
    share = heads.attrs["share"]
    if not (heads.tokens > 0).any():
        raise UsageError(f"{text.title(heads)!r} has nothing done yet: there is nothing to report")
    layers = by_layer(heads, share)
    best = most_repaired(heads, RANKED, share)
    name = line(store or Path(ds.encoding.get("source") or "results.zarr").name)
    parts = {
        "title": _safe(text.title(heads)),
        "basis": _safe(text.basis(heads)),
        "banner": "".join(f"<p class=banner>Not finished: {line}.</p>" for line in text.unfinished(heads)),
        "facts": _facts(heads, layers),
        "figures": "".join(_figure(name, figure) for name, figure in figures.drawn(ds, share=share)),
        "task": "".join(f"<p class=note>{escape(line)}.</p>" for line in text.task(heads)),
        "over": escape(text.each_heads(share)),
        "counted": ".where(ds.counted)" if "counted" in ds else "",
        "layers": _layer_table(layers),
        "best": _head_table(best),
        "worst": _head_table(most_repaired(heads, -RANKED, share)),
        "every": _head_table(_in_order(heads)),
        "layer": str(int(best["layer"][0])),
        "head": str(int(best["head"][0])),
        "n_heads": str(int((heads.tokens > 0).sum())),
        "store": _safe(repr(name)),
        "variables": _variables(ds),
        "provenance": _provenance(attributes),
    }
    return PAGE.substitute(parts)


def report(ds: xr.Dataset, path: str | Path, *, share: float | None = None, store: str | None = None) -> Path:
    """Write the report of a store to `path`, and return it. Arguments and errors as in `render`."""
    path = local(path)
    page = render(ds, share=share, store=store)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _safe(words: str) -> str:
    """Words for the page, whoever wrote them."""
    return escape(line(words))


def _facts(heads: xr.Dataset, layers: xr.Dataset) -> str:
    """The few numbers to look at first."""
    repaired = heads.top_repaired.values[(heads.tokens > 0).values]
    best = int(layers["layer"].values[np.nanargmax(layers.top_self_repair.values)])
    cards = {
        "heads repaired": f"{int(repaired.sum())} of {repaired.size}",
        "most repaired head": text.labels(most_repaired(heads, 1, heads.attrs["share"]))[0],
        "most repaired layer": str(best),
        "noise floor": text.noise(heads).removeprefix("noise floor "),
        "worst |closure|": text.worst_closure(heads),
    }
    pairs = ((_safe(name), _safe(value)) for name, value in cards.items())
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in pairs)


def _figure(name: str, figure: Figure) -> str:
    image = base64.b64encode(outlined_svg(figure)).decode()
    about = _safe(figures.DESCRIPTIONS[name])
    source = f'src="data:image/svg+xml;base64,{image}" alt="{about}"'
    return f"<figure><img {source}><figcaption>{about}</figcaption></figure>"


def _layer_table(layers: xr.Dataset) -> str:
    rows = []
    for index in np.flatnonzero(layers.heads.values):
        one = layers.isel(layer=index)
        cells = {"layer": str(int(one["layer"])), "heads": str(int(one.heads))}
        cells |= {name: text.number(float(one[key])) for name, key in LAYER_COLUMNS.items()}
        cells["self-repair"] += "~" if one.under_noise else ""
        rows.append(cells | {name: f"{float(one[key]):.0%}" for name, key in SHARES.items()})
    return _table(rows)


def _head_table(heads: xr.Dataset) -> str:
    rows = []
    for index, label in enumerate(text.labels(heads)):
        one = heads.isel(rank=index)
        cells = {"head": label} | {name: text.number(float(one[key])) for name, key in HEAD_COLUMNS.items()}
        cells["± s.e."] = cells["± s.e."].removeprefix("+")
        cells["norm share"] = f"{float(one.norm_share):.0%}"
        rows.append(cells | {"tokens": f"{int(one.top_tokens):,}"})
    return _table(rows)


def _in_order(heads: xr.Dataset) -> xr.Dataset:
    every = heads.stack(rank=("layer", "head")).reset_index("rank")
    return every.isel(rank=np.flatnonzero(every.tokens.values))


def _table(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{_safe(name)}</th>" for name in rows[0])
    cells = ("".join(f"<td>{_safe(cell)}</td>" for cell in row.values()) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _variables(ds: xr.Dataset) -> str:
    rows = [
        {
            "variable": str(name),
            "dimensions": ", ".join(map(str, array.dims)) or "none",
            "units": str(array.attrs.get("units", "")),
            "description": str(array.attrs.get("description", array.attrs.get("long_name", ""))),
        }
        for name, array in ds.variables.items()
    ]
    return _table(rows)


def _provenance(attributes: Mapping[str, Any]) -> str:
    return _nested({str(name): _decoded(value) for name, value in attributes.items()})


def _decoded(value: Any) -> Any:
    """What a JSON string of an object or a list says; anything else as it is."""
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _nested(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"<dt>{_safe(str(name))}</dt><dd>{_nested(inner)}</dd>" for name, inner in value.items())
        return f"<dl>{''.join(pairs)}</dl>"
    shown = json.dumps(value) if isinstance(value, list) else str(value)
    return f"<code>{_safe(shown)}</code>"


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Self-repair: $title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem }
body { margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
.basis, figcaption, .note { color: #555; margin: .2rem 0 1rem }
.banner { background: #fff3d6; border-left: 4px solid #e69f00; padding: .5rem .8rem }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 }
.facts div { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .8rem; flex: 1 }
.facts b { display: block; font-size: 1.1rem } .facts span { color: #555; font-size: .85rem }
figure { margin: 1rem 0 1.6rem } figcaption { font-size: .9rem }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #eee }
td { font-variant-numeric: tabular-nums }
th { border-bottom: 2px solid #888; font-weight: 600 } th:first-child, td:first-child { text-align: left }
.words td, .words th { text-align: left } summary { cursor: pointer; margin: .8rem 0 .4rem }
pre, code { background: #f6f6f6; border-radius: 4px; overflow-wrap: anywhere }
pre { padding: .7rem; overflow-x: auto }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .2rem 0 }
dl, dl dl { font-size: .85rem } dl dl dl { font-size: 1em }
dt { color: #555 } dd { margin: 0; min-width: 0 }
@media print { body { margin: 0; max-width: none } figure, tr { break-inside: avoid } }
</style>
</head>
<body>
<h1>Self-repair: $title</h1>
<p class="basis">$basis</p>
$task
$banner
<div class="facts">$facts</div>

<h2>How to read this</h2>
<p>Each attention head is ablated by itself. Its <i>direct effect</i> is what it writes towards the logit of
the next token, in logits, under the final norm's clean scale. If nothing reacted to the ablation, the logit
would change by as much as the head's own direct effect does. What it changes beyond that is
<i>self-repair</i>: positive where the rest of the model makes up for a loss, negative where it breaks
further (Equation 1 of Rushing and Nanda, 2024). It is the sum of what the other heads, the MLPs and the
final norm do differently (Equation 2); the <i>closure</i> is the difference between the two sides, measured
and not assumed. What lies under the <i>noise floor</i>, the effect of replacing a head by itself in a pass
that rounds differently, is rounding. Means are over $over,
unless a figure says otherwise.</p>

<h2>Figures</h2>
$figures

<h2>Layers</h2>
<p class="note">Means over heads, in logits. Norm share: how much of the direct effect the norm repairs,
clipped to 0 to 100% on each token. Repaired: heads whose self-repair has the sign of their direct effect
and exceeds the noise floor. ~ marks a mean under the noise floor.</p>
$layers

<h2>Most repaired heads</h2>
$best
<h2>Least repaired heads</h2>
$worst
<details><summary>All $n_heads heads</summary>
$every
</details>

<h2>Open the store</h2>
<p>The numbers open with xarray alone:</p>
<pre>import xarray as xr
ds = xr.open_zarr($store, consolidated=False)
ds.self_repair.sel(layer=$layer, head=$head)$counted.mean()  # what is not computed is NaN</pre>
<details class="words"><summary>What it holds</summary>
$variables
</details>

<h2>Where the numbers come from</h2>
$provenance
</body>
</html>
""")
