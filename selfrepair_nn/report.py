"""A report of a store, or of several, as one HTML file: explorer, figures, tables, where the numbers come from.

The file needs nothing else: no network, no font, and no script but the explorer's own.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape, unescape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from selfrepair_nn import figures, text, wording
from selfrepair_nn.analysis import (
    by_case,
    by_head,
    by_layer,
    by_variant,
    has_nulls,
    held,
    in_nats,
    most_repaired,
    reinforced,
    reinforcement_by_head,
    reinforcement_nulls,
    remembering,
)
from selfrepair_nn.choosing import viewed
from selfrepair_nn.confidence import CLUSTERS, RATE
from selfrepair_nn.drawing import Drawing
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer.contents import Contents, has_tokens
from selfrepair_nn.explorer.rendering import page
from selfrepair_nn.face import public
from selfrepair_nn.figures import Datasets, style, suiting
from selfrepair_nn.figures.look import looking
from selfrepair_nn.hub import is_address
from selfrepair_nn.paths import local
from selfrepair_nn.quantities import OUTCOMES, TOKEN
from selfrepair_nn.recipe import find_recipe
from selfrepair_nn.shown import decoded, line
from selfrepair_nn.values import one_of

RANKED = 10
HEAD_COLUMNS = {
    "direct effect": "top_direct_effect",
    "logit change": "top_logit_change",
    "self-repair": "top_self_repair",
    "95%": "top_self_repair_half_width",
    "from components": "top_from_components",
    "from heads": "top_from_heads",
    "from MLPs": "top_from_mlps",
    "from mixers": "top_from_mixers",
    "from post-norms": "top_from_post_norms",
    "from norm": "top_from_norm",
}
READ = (
    *HEAD_COLUMNS.values(),
    *("norm_share", "norm_share_half_width", "top_q_value", "top_tokens", "top_repaired", "top_broken"),
)
"""What the row of a head or a case is read from: to take a row of all that a summary holds takes many times as long."""


def render(
    ds: Datasets,
    *,
    share: float | None = None,
    store: str | None = None,
    recipe: str | Path | None = None,
    names: Iterable[str] | None = None,
    outcome: str = "logit",
    tail: str | None = None,
    split_selection: bool | None = None,
    against: str | None = None,
    size: Any = None,
    caption: bool = True,
) -> str:
    """The report of a store as HTML; `store` is its directory's name, by default where `ds` came from.

    `recipe` is a recipe's name or the path of your own: the figures that its file defines are on the page too.
    `names` are figures, by default all that suit the store. `outcome` "logprob" draws them in nats; tables stay in
    logits. `tail`, `split_selection`, `against`, `size` and `caption` as in `plot`.

    Of single heads, each ablated in one way, it has tables of layers and heads; of cases, of several variants and of
    heads that read their own write, one of what the store has instead. Of several stores, as in `plot`, it has figures
    of all together, the summary of each, and the first two side by side.

    Raises:
        UsageError: `ds` is not a store, `share` is not in (0, 1], or nothing is done yet; a figure that there is not,
            or that the store does not suit; an outcome that it does not hold; a size that cannot be; a `store` of
            several.
    """
    one_of("outcome", outcome, OUTCOMES)
    found = None if recipe is None else find_recipe(recipe)
    figures.require_figures(names or (), found)
    wholes = style.named(ds)
    stores = {name: held(viewed(each, tail, split_selection, against)) for name, each in wholes.items()}
    asked = stores
    if outcome == "logprob":
        asked = {n: held(viewed(in_nats(each), tail, split_selection, against)) for n, each in wholes.items()}
    first = next(iter(stores.values()))
    figures.note_unknown(first, found)
    with remembering(), looking(size, caption):
        drawn = figures.drawn(asked, names, share=share, recipe=found)
        if len(stores) > 1:
            return _of_several(stores, share, store, drawn)
        return (_of_heads if suiting.grid(first) else _of_others)(first, share, store, drawn)


Drawn = Iterable[tuple[Drawing, Figure]]


def _of_heads(ds: xr.Dataset, share: float | None, store: str | None, drawn: Drawn) -> str:
    """The page of a store of single heads, each ablated in one way."""
    heads = by_head(ds, share)
    share = heads.attrs["share"]
    if not (heads.tokens > 0).any():
        raise UsageError(f"{wording.title(heads)!r} has nothing done yet: there is nothing to report")
    layers = by_layer(heads, share)
    best = most_repaired(heads, RANKED, share)
    parts = _common(ds, heads, store, drawn) | {
        "basis": _safe(wording.basis(heads)),
        "facts": _facts(heads, layers),
        "over": _safe(wording.each_heads(heads)),
        "layers": _layer_table(layers),
        "intervals": _safe(style.capital(wording.intervals(heads))),
        "rate": f"{RATE:.0%}",
        "clusters": str(CLUSTERS),
        "best": _head_table(best),
        "worst": _head_table(most_repaired(heads, -RANKED, share)),
        "every": _head_table(_in_order(heads)),
        "place": f"layer={int(best['layer'][0])}, head={int(best['head'][0])}",
        "n_heads": str(int((heads.tokens > 0).sum())),
    }
    return _page(ds, share, PAGE, parts)


def _of_others(ds: xr.Dataset, share: float | None, store: str | None, drawn: Drawn) -> str:
    """The page of a store of cases, of variants, or of reinforced heads."""
    own, found = _edits(ds), _found(ds, share)
    dims = [str(d) for d in ds.self_repair.dims if d not in TOKEN]
    parts = _common(ds, found, store, drawn) | {
        "basis": _safe(wording.basis(found, top=not own)),
        "summary": escape(str(text.summary(ds, share))),
        "every": "" if own else _site_table(found, dims),
        "over": "one position of each prompt"
        if own
        else wording.each_heads(found, "the"),
        "rate": f"{RATE:.0%}",
        "place": _safe(repr({d: ds[d].values.tolist()[0] for d in dims})),
    }
    return _page(ds, share, PAGE_OF_OTHERS, parts)


def _of_several(stores: Mapping[str, xr.Dataset], share: float | None, store: str | None, drawn: Drawn) -> str:
    """The page of several stores: to look at side by side, figures of all, and what is found in each."""
    if store is not None:
        raise UsageError(f"store {store!r} is one store's name, and there are {len(stores)}: leave it out")
    title, head, each = _safe(" and ".join(stores)), [], []
    for name, ds in stores.items():
        found = _found(ds, share)
        parts = _common(ds, found, None, ()) | {"name": _safe(name), "basis": _safe(wording.basis(found))}
        head.append(BASIS.substitute(parts))
        each.append(SECTION.substitute(parts, summary=escape(str(text.summary(ds, share)))))
    shown = "".join(_figure(drawing, figure) for drawing, figure in drawn)
    looked_at = [Contents(ds, share, name).data() for name, ds in stores.items() if has_tokens(ds)]
    rest = f"<h2>Figures</h2>{shown}" + "".join(each)
    return page(looked_at, title=unescape(title), head=f"<h1>Self-repair: {title}</h1>{''.join(head)}", rest=rest)


def _page(ds: xr.Dataset, share: float | None, body: Template, parts: dict[str, str]) -> str:
    """The explorer of a store, which a summary has none of, and what there is to read."""
    stores = [Contents(ds, share).data()] if has_tokens(ds) else []
    return page(stores, title=unescape(parts["title"]), head=HEAD.substitute(parts), rest=body.substitute(parts))


def _found(ds: xr.Dataset, share: float | None) -> xr.Dataset:
    """The summary of a store of cases, of variants, of reinforced heads, or of single heads."""
    found = _of_edits(ds) if _edits(ds) else _summed_up(ds, share)
    if not (found.tokens > 0).any():
        raise UsageError(f"{wording.title(found)!r} has nothing done yet: there is nothing to report")
    return found


def _edits(ds: xr.Dataset) -> bool:
    return reinforced(ds) or has_nulls(ds)


def _of_edits(ds: xr.Dataset) -> xr.Dataset:
    """The summary of a store of heads that read their own write, or nulls of it."""
    return reinforcement_by_head(ds) if reinforced(ds) else reinforcement_nulls(ds)


def _common(ds: xr.Dataset, found: xr.Dataset, store: str | None, drawn: Drawn) -> dict[str, str]:
    """What every page holds, of a store and what is found in it."""
    return {
        "title": _safe(wording.title(found)),
        "task": "".join(
            f"<p class=note>{_safe(told)}.</p>"
            for told in (*map(style.capital, wording.selection(found)), *wording.task(found))
        ),
        "banner": _banners(found),
        "figures": "".join(_figure(each, figure) for each, figure in drawn),
        "counted": ".where(ds.counted)" if "counted" in ds else "",
        "top": escape(TOP) if "threshold" in ds and "counted" in ds else "",
        "store": _safe(repr(store or _called(ds))),
        "variables": _variables(ds),
        "provenance": _provenance(ds.attrs),
    }


def _called(ds: xr.Dataset) -> str:
    """How a reader opens the store: by its name, or its address on the hub."""
    source = ds.encoding.get("source") or "results.zarr"
    return source if is_address(source) else Path(source).name


def _summed_up(ds: xr.Dataset, share: float | None) -> xr.Dataset:
    """The summary of each case or head, in each variant where there are several."""
    one = by_case if "case" in ds.dims else by_head
    return one(ds, share) if suiting.axis(ds) is None else by_variant(ds, share, one)


@public
def report(
    ds: Datasets,
    path: str | Path | None = None,
    *,
    share: float | None = None,
    store: str | None = None,
    recipe: str | Path | None = None,
    names: Iterable[str] | None = None,
    outcome: str = "logit",
    tail: str | None = None,
    split_selection: bool | None = None,
    against: str | None = None,
    size: Any = None,
    caption: bool = True,
) -> Path:
    """Write the report of a store, or of several, to `path`, by default beside the first, and return that.

    Other arguments and errors as in `render`.
    """
    path = local(_beside(ds) if path is None else path)
    choices: dict[str, Any] = {"tail": tail, "split_selection": split_selection, "against": against}
    choices |= {"names": names, "outcome": outcome, "size": size, "caption": caption}
    text = render(ds, share=share, store=store, recipe=recipe, **choices)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _beside(ds: Datasets) -> Path:
    """Where the page of these stores goes."""
    stores = [ds] if isinstance(ds, xr.Dataset) else ds.values() if isinstance(ds, Mapping) else ds
    found = [*map(figures.beside, stores)]
    if not found:
        raise UsageError("no dataset was given: a page is of one store, or of several")
    return found[0].with_name("-".join(each.name for each in found) + ".html")


def _banners(heads: xr.Dataset) -> str:
    """What must be known before anything is read."""
    loud = [f"<p class='banner loud'>{_safe(told)}</p>" for told in wording.warnings(heads)]
    return "".join(
        [*loud, *(f"<p class=banner>Not finished: {told}.</p>" for told in wording.unfinished(heads))]
    )


def _safe(words: str) -> str:
    """Words for the page, whoever wrote them."""
    return escape(line(words))


def _facts(heads: xr.Dataset, layers: xr.Dataset) -> str:
    """The few numbers to look at first."""
    tested = int(heads.top_p_value.notnull().sum())
    few = f"too few {heads.attrs['clustered_by']}s for an interval"
    best = int(layers["layer"].values[np.nanargmax(layers.top_self_repair.values)])
    cards = {
        "heads repaired": f"{int(heads.top_repaired.sum())} of {tested}" if tested else few,
        "heads broken": f"{int(heads.top_broken.sum())} of {tested}" if tested else few,
        "most repaired head": wording.labels(most_repaired(heads, 1, heads.attrs["share"]))[0] if tested else few,
        "most repaired layer": str(best) if tested else few,
        "noise floor": wording.noise(heads).removeprefix("noise floor "),
        "worst |closure|": wording.worst_closure(heads),
    }
    pairs = ((_safe(name), _safe(value)) for name, value in cards.items())
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in pairs)


def _figure(drawing: Drawing, figure: Figure) -> str:
    image = base64.b64encode(style.outlined_svg(figure)).decode()
    about = _safe(drawing.about)
    source = f'src="data:image/svg+xml;base64,{image}" alt="{about}"'
    return f"<figure><img {source}><figcaption>{about}</figcaption></figure>"


def _layer_table(layers: xr.Dataset) -> str:
    rows = []
    for index in np.flatnonzero(layers.heads.values):
        one = layers.isel(layer=index)
        cells = {"layer": str(int(one["layer"])), "heads": str(int(one.heads))}
        cells |= _numbers(one)
        cells["self-repair"] += "~" if one.under_noise else ""
        rows.append(
            cells | {"repaired": _share_of(one, "top_repaired"), "broken": _share_of(one, "top_broken")}
        )
    return _table(rows)


def _share_of(layer: xr.Dataset, name: str) -> str:
    """ "5 of 8" heads; "-" where none has an interval."""
    tested = int(layer.top_tested)
    return f"{round(float(layer[name]) * tested)} of {tested}" if tested else "-"


def _numbers(one: xr.Dataset) -> dict[str, str]:
    """The cells that heads and layers have in common."""
    cells = {name: wording.number(float(one[key])) for name, key in HEAD_COLUMNS.items() if key in one}
    cells["95%"] = wording.reach(float(one.top_self_repair_half_width)) or "-"
    return cells | {"norm share": style.shown_share(one, "norm_share")}


def _head_table(heads: xr.Dataset) -> str:
    labels, shown = wording.labels(heads), _read(heads)
    return _table([{"head": label} | _cells(shown.isel(rank=i)) for i, label in enumerate(labels)])


def _read(found: xr.Dataset) -> xr.Dataset:
    return found[[name for name in READ if name in found]]


def _site_table(found: xr.Dataset, dims: list[str]) -> str:
    """A row for each variant of each case or head of which something is done."""
    tokens = found.tokens.broadcast_like(found.top_self_repair).stack(row=dims)
    flat = _read(found).stack(row=dims)
    each = (flat.isel(row=index) for index in np.flatnonzero(tokens.values))
    return _table([{d: str(one[d].values) for d in dims} | _cells(one) for one in each])


def _cells(one: xr.Dataset) -> dict[str, str]:
    """The cells of a head or a case."""
    q = float(one.top_q_value)
    cells = _numbers(one) | {"tokens": f"{int(one.top_tokens):,}"}
    cells["q"] = "-" if np.isnan(q) else f"{q:.2g}"
    return cells | {"repaired": "yes" if one.top_repaired else "broken" if one.top_broken else "-"}


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
    return _nested({str(name): decoded(value) for name, value in attributes.items()})


def _nested(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"<dt>{_safe(str(name))}</dt><dd>{_nested(inner)}</dd>" for name, inner in value.items())
        return f"<dl>{''.join(pairs)}</dl>"
    shown = json.dumps(value) if isinstance(value, list) else str(value)
    return f"<code>{_safe(shown)}</code>"


HEAD = Template("""<h1>Self-repair: $title</h1>
<p class="basis">$basis</p>
$task
$banner
""")
BASIS = Template("""<p class="basis">$name: $basis</p>
$task
$banner
""")
SECTION = Template("""
<h2>$name</h2>
<pre>$summary</pre>
<details class="words"><summary>Open it, and where its numbers come from</summary>
<pre>import xarray as xr
ds = xr.open_zarr($store, consolidated=False)$top</pre>
$provenance
</details>
""")
OF_HEADS = """
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
clipped to 0 to 100% on each token. Repaired (broken): heads whose mean self-repair surely has the sign of their
direct effect (the other sign) and exceeds the noise floor, at a false discovery rate of $rate over all heads, of those
that have an interval: at least $clusters documents, or prompts, that hold one of their tokens. $intervals. ~ marks a
mean under the noise floor.</p>
$layers

<h2>Most repaired heads</h2>
<p class="note">q: the false discovery rate at which the mean would be called different from zero. Heads are ranked as
they were measured: the first of many are likely to have been measured too high.</p>
$best
<h2>Least repaired heads</h2>
$worst
<details><summary>All $n_heads heads</summary>
$every
</details>
"""
OF_OTHERS = """
<h2>How to read this</h2>
<p>Each case is a part of the model, or several parts together, that is ablated: a head, unless its label says
otherwise. Its <i>direct effect</i> is what it writes towards the logit of the next token, in logits, under the final
norm's clean scale. If nothing reacted to the ablation, the logit would change by as much as the part's own direct
effect does. What it changes beyond that is <i>self-repair</i>: positive where the rest of the model makes up for a
loss, negative where it breaks further (Equation 1 of Rushing and Nanda, 2024). Several variants are the same parts,
ablated or frozen in different ways. Means are over $over, unless the summary or a figure says
otherwise. Repaired (broken): heads or cases whose mean self-repair surely has the sign of their direct effect (the
other sign) and exceeds the noise floor, at a false discovery rate of $rate.</p>

<h2>Summary</h2>
<pre>$summary</pre>

<h2>Figures</h2>
$figures

<details><summary>Every case</summary>
$every
</details>
"""
TOP = """
top = ds.counted & (ds.direct_effect >= ds.threshold)  # the top share of each head or case
ds.self_repair.where(top).mean(("prompt", "position"), dtype=float)"""
TAIL = """
<h2>Open the store</h2>
<p>The numbers open with xarray alone:</p>
<pre>import xarray as xr
ds = xr.open_zarr($store, consolidated=False)
ds.self_repair.sel($place)$counted.mean()  # what is not computed is NaN$top</pre>
<details class="words"><summary>What it holds</summary>
$variables
</details>

<h2>Where the numbers come from</h2>
$provenance
"""
PAGE, PAGE_OF_OTHERS = Template(OF_HEADS + TAIL), Template(OF_OTHERS + TAIL)
