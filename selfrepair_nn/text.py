"""What a store holds, in words: the summary printed after a run, the titles and captions of figures."""

import json
import textwrap
from pathlib import Path

import numpy as np
import xarray as xr

from selfrepair_nn.analysis import (
    HEADS,
    SHARE,
    among,
    axis_of,
    by_case,
    by_head,
    by_layer,
    by_variant,
    compare_paper,
    most_repaired,
    percent,
    reinforcement_by_head,
    strongest_responses,
)
from selfrepair_nn.components import Head
from selfrepair_nn.shown import line
from selfrepair_nn.variables import SWEEP

WIDTH = 100
COLUMNS = {
    "direct effect": "top_direct_effect",
    "logit change": "top_logit_change",
    "self-repair": "top_self_repair",
    "= heads": "top_from_heads",
    "+ MLPs": "top_from_mlps",
    "+ norm": "top_from_norm",
}
QUANTITY_NAMES = {
    "direct_effect": "direct effect",
    "ablated_direct_effect": "ablated DE",
    "logit_change": "logit change",
    "self_repair": "self-repair",
    "from_heads": "from heads",
    "from_mlps": "from MLPs",
    "from_norm": "from norm",
    "norm_share": "norm share",
}


def summary(ds: xr.Dataset, share: float | None = None) -> str:
    """What a user sees after a run: plain text of at most 100 columns; `ds` is a store or its summary.

    One line per layer with something done, means over its heads on their top share in logits (Equation 2);
    the most repaired heads, the noise floor and the worst closure. Of a store of cases one line per case; of one of
    several variants one line per variant, means over all heads; of one of reinforced heads those that respond to their
    own write. Errors as in `by_head`.
    """
    ds = legible(ds)
    if "edited_position" in ds.coords:
        return _of_reinforced(ds)
    if "case" in ds.dims or not {*ds.self_repair.dims} <= {*SWEEP}:
        return _of_others(ds, share)
    heads = by_head(ds, share)
    share = heads.attrs["share"]
    layers = by_layer(heads, share)
    layers = layers.isel(layer=np.flatnonzero(layers.heads.values))
    means = f"Means over heads on {each_heads(share)}, in logits:"
    opening = [*_opening(heads), "", means]
    if not layers.sizes["layer"]:
        return "\n".join([*opening[:-1], "nothing is done yet"])
    rows = [_header(), *(_row(layers.isel(layer=i)) for i in range(layers.sizes["layer"])), ""]
    if layers.under_noise.any():
        rows[-1:] = ["~ mean self-repair under the noise floor of its layer", ""]
    best = most_repaired(heads, 5, share)
    closing = [f"most repaired: {_ranking(best)}", f"{noise(heads)}, worst |closure| {worst_closure(heads)}"]
    return "\n".join([*opening, *rows, *closing, *textwrap.wrap(_how_well_known(heads), WIDTH)])


def _how_well_known(heads: xr.Dataset) -> str:
    """Of a run until its intervals are narrow: how many of them are, and what that took; otherwise nothing."""
    if "half_width" not in heads:
        return ""
    goal, what = json.loads(heads.attrs["settings"])["until_ci"]
    widths = (
        heads.half_width.values[heads.selected.values] if what == "heads" else heads.layer_half_width.values
    )
    used = heads.prompts_used.values[heads.selected.values]
    return (
        f"the 95% intervals of the {what}' means: {(widths <= goal).sum()} of {len(widths)} within ±{goal:g} logits, "
        f"with {_span(heads.prompts_used)} of {heads.attrs['prompts']} prompts (mean {used.mean():.0f})"
    )


def _of_reinforced(ds: xr.Dataset) -> str:
    """The heads that are self-repressing and self-reinforcing, the strongest first, at most ten of each."""
    found = reinforcement_by_head(ds)
    opening = textwrap.wrap(f"{title(found)}: {basis(found, top=False)}", WIDTH)
    if not (found.tokens > 0).any():
        return "\n".join([*opening, "nothing is done yet"])
    scales = ", ".join(f"{scale:g}" for scale in found["scale"].values)
    told = f"Slope of the change of direct effect on the direct effect, at scales {scales}:"
    lines = [*opening, "", told]
    for kind, count in {"self-repressing": 10, "self-reinforcing": -10}.items():
        best = strongest_responses(found, count)
        lines.append(
            f"{kind}: {int((found.kind == -np.sign(count)).sum())} of {int((found.tokens > 0).sum())} heads"
        )
        for i, label in enumerate(labels(best)):
            lines.append(
                f"  {label:<8}" + "".join(f"{value:+9.3f}" for value in best.slope.isel(rank=i).values)
            )
    return "\n".join([*lines, "", noise(found)])


def _of_others(ds: xr.Dataset, share: float | None) -> str:
    """The summary of a store of cases, or of variants."""
    if "case" in ds.dims:
        along, found = "case", by_case(ds, share)
        what, rows = "Means", found
    else:
        along, found = axis_of(ds), by_variant(ds, share)
        what, rows = "Means over all heads", found[list(COLUMNS.values())].mean(HEADS)
    opening = _opening(found)
    if not (found.tokens > 0).any():
        return "\n".join([*opening, "nothing is done yet"])
    means = f"{what} on {each_heads(found.attrs['share'], 'the')}, in logits:"
    labels = [str(label) for label in found[along].values]
    width = max(map(len, [along, *labels]))
    table = [along.ljust(width) + "".join(f"{name:>15}" for name in COLUMNS)]
    for i, label in enumerate(labels):
        one = rows.isel({along: i})
        table.append(label.ljust(width) + "".join(f"{number(float(one[n])):>15}" for n in COLUMNS.values()))
    closing = f"{noise(found)}, worst |closure| {worst_closure(found)}"
    return "\n".join([*opening, "", means, *table, "", closing])


def comparison(ds: xr.Dataset, reference: str | None = None) -> str:
    """A store's per-layer means beside the paper's, as plain text of at most 100 columns; arguments as `compare_paper`.

    The last line of each table is the mean over layers of the absolute difference. Errors as in `compare_paper`.
    """
    ds = legible(ds)
    heads = by_head(ds, SHARE)
    found = compare_paper(heads, reference)
    found = found.isel(layer=np.flatnonzero(found.direct_effect.sel(source="store").notnull()))
    name, same = found.attrs["reference"], found.attrs["n_layers"] == found.attrs["reference_n_layers"]
    opening = [f"{title(heads)}, beside {name} as the paper's authors published it", basis(heads)]
    opening += [found.attrs["differs"]] if "differs" in found.attrs else []
    if not same:
        sizes = f"{found.attrs['n_layers']} layers here, {found.attrs['reference_n_layers']} there"
        opening.append(f"{sizes}: each stands beside the layer of {name} at the same depth.")
    opening.append("Means over heads on each head's top 2% of tokens by direct effect, in logits:")
    if not found.sizes["layer"]:
        return "\n".join([*opening[:-1], "nothing is done yet"])
    lines = [line for each in opening for line in textwrap.wrap(each, WIDTH)]
    names = list(QUANTITY_NAMES)
    for shown in (names[:4], names[4:]):
        lines += ["", *_beside(found[shown], same)]
    return "\n".join(lines)


def legible(ds: xr.Dataset) -> xr.Dataset:
    """The same numbers, with every attribute and label of an axis fit to be printed or drawn: others may have made it.

    Attributes are cut to a line's width, those in JSON excepted. The texts of single tokens are left as they are.
    """
    attributes = {
        name: _legible(value) if isinstance(value, str) else value for name, value in ds.attrs.items()
    }
    labels = {name: c for name, c in ds.coords.items() if c.dtype.kind in "OTU" and c.ndim < 2}
    filtered = {
        n: (c.dims, np.vectorize(line, [object])(c.values), c.attrs) for n, c in labels.items() if c.size
    }
    return ds.assign_coords(filtered).assign_attrs(attributes)


def _legible(value: str) -> str:
    return line(value, None if value.startswith(("{", "[")) else WIDTH)


def title(ds: xr.Dataset) -> str:
    """Model and ablation, as far as the store tells, and what is frozen if anything is."""
    frozen = ds.attrs.get("freeze", "none")
    parts = [model(ds), ablation(ds), *([f"frozen: {frozen}"] if frozen != "none" else [])]
    return ", ".join(parts)


def ablation(ds: xr.Dataset) -> str:
    """What was done to a site, in words."""
    done = str(ds.attrs.get("ablation", "")).split(", ")
    if done[0].startswith("reinforce"):
        return f"heads reinforced by {', '.join(each.split('_')[-1] for each in done)} × their own write"
    return f"{', '.join(done)} ablation" if "ablation" in ds.attrs else "ablation not recorded"


def model(ds: xr.Dataset) -> str:
    """The model's name; of a directory's path only the last part."""
    name = str(ds.attrs.get("model", "unnamed model"))
    return Path(name).name if Path(name).is_absolute() else name


def basis(heads: xr.Dataset, top: bool = True) -> str:
    """What the means of a summary are over: heads, tokens, top share, target; and how much is done."""
    number = int((heads.tokens > 0).sum())
    site = "case" if "case" in heads.dims else "head"
    some = heads.attrs.get("counted_share", 1) < 1
    parts = [f"{number} {site}{'s' * (number != 1)}", f"{_span(heads.tokens)} tokens each"]
    if some:
        parts[-1] += f" that count ({percent(heads.attrs['counted_share'])} of all)"
    if top and not (some and heads.attrs["share"] == 1):
        parts.append(f"{_span(heads.top_tokens)} in the top {percent(heads.attrs['share'])}")
    parts.append(f"{heads.attrs.get('target', 'unknown')} target")
    return ", ".join(parts + unfinished(heads))


def each_heads(share: float, whose: str = "each head's") -> str:
    """The tokens that means are over, in words."""
    return f"{whose} top {percent(share)} of tokens by direct effect" if share < 1 else f"the {among(share)}"


def _opening(found: xr.Dataset) -> list[str]:
    """Whose numbers these are and what they are over; and whether the model does the task, if it is one."""
    lines = [f"{title(found)}: {basis(found)}", *task(found)]
    return [part for line in lines for part in textwrap.wrap(line, WIDTH)]


def task(heads: xr.Dataset) -> list[str]:
    """Whether the model does the task of its prompts, one line; none where they are no task."""
    return [heads.attrs["task"]] if "task" in heads.attrs else []


def unfinished(heads: xr.Dataset) -> list[str]:
    done = heads.attrs.get("done_share", 1)
    enough = "half_width" in heads and "finished" in heads.attrs
    return [] if done == 1 or enough else [f"{percent(min(done, 0.999))} of the run done"]


def noise(heads: xr.Dataset) -> str:
    """The noise floor of the layers, from the smallest to the largest."""
    floors = heads.noise_floor.values[np.isfinite(heads.noise_floor.values)]
    if not floors.size:
        return "noise floor not measured"
    low, high = f"{floors.min():.1g}", f"{floors.max():.1g}"
    return f"noise floor {low if low == high else f'{low} to {high}'} logits"


def worst_closure(heads: xr.Dataset) -> str:
    values = heads.worst_closure.where(heads.tokens > 0).values
    values = values[np.isfinite(values)]
    return f"{values.max():.1g} logits" if values.size else "unknown"


def number(value: float) -> str:
    """A signed number: three decimals, or one digit and the power of ten where those would show none."""
    if np.isnan(value):
        return "-"
    return f"{value:+.0e}" if 0 < abs(value) < 0.0005 else f"{value:+.3f}"


def labels(heads: xr.Dataset) -> list[str]:
    """ "L11H2" for every head of a result of `most_repaired`."""
    places = zip(heads["layer"].values, heads["head"].values, strict=True)
    return [Head(int(layer), int(head)).label for layer, head in places]


def _span(counts: xr.DataArray) -> str:
    known = counts.values[counts.values > 0]
    if not known.size:
        return "0"
    low, high = int(known.min()), int(known.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _header() -> str:
    return "layer heads " + "".join(f"{name:>12} " for name in COLUMNS) + "repaired"


def _row(layer: xr.Dataset) -> str:
    marks = {"top_self_repair": "~" if layer.under_noise else " "}
    cells = "".join(f"{number(float(layer[name])):>12}{marks.get(name, ' ')}" for name in COLUMNS.values())
    return f"{int(layer.layer):5}{int(layer.heads):6}  {cells}{float(layer.top_repaired):8.0%}"


def _beside(found: xr.Dataset, same: bool) -> list[str]:
    """A table of the store's and the paper's columns of some quantities."""
    lines = ["layer".ljust(12) + "".join(f"{QUANTITY_NAMES[name]:>21}" for name in found.data_vars)]
    lines.append(" " * 12 + f"{'here':>12}{'paper':>9}" * len(found.data_vars))
    for layer in range(found.sizes["layer"]):
        one = found.isel(layer=layer)
        label = f"{int(one.layer):5}" + ("" if same else f" / {int(one.reference_layer)}")
        cells = (f"{number(here):>12}{number(paper):>9}" for here, paper in (v.values for v in one.values()))
        lines.append(label.ljust(12) + "".join(cells))
    apart = (float(abs(v.diff("source")).mean()) for v in found.values())
    return [*lines, "apart".ljust(12) + "".join(f"{value:21.3f}" for value in apart)]


def _ranking(best: xr.Dataset) -> str:
    pairs = zip(labels(best), best.top_self_repair.values, strict=True)
    return "  ".join(f"{label} {number(value)}" for label, value in pairs)
