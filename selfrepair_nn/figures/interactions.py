"""Pairs of heads: redundant, additive or synergetic, beside who changes when whom is ablated."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, interactions
from selfrepair_nn.analysis.interactions import ADDITIVE, RELATIONS
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting

COLOURS = colormaps["RdBu"].with_extremes(bad="#E4E4E4")
MARKS = {"redundant": "R", "synergetic": "S", "additive": "A", "unclear": "?"}
FEW = 6
"""Heads of whose cells letters are as large as elsewhere."""
DARK = 0.55
"""Beyond this share of the scale a cell is so dark that what is written in it must be white."""
READING = (
    "Left: self-repair of both heads ablated together less that of each alone, on the pair's {top}. "
    "Below zero each backs "
    "the other up. R redundant, S synergetic:",
    "surely not 0 (false discovery rate {rate:.0%} over the pairs) and beyond the noise floor. A additive: the whole "
    "interval within {additive:.0%} of what the pair's ablation removes. ? neither is known.",
    "Right: change of the column's direct effect when the row is ablated, on the row's {top}; pale where it may be 0. "
    "±: 95% intervals. Grey: the head itself, or what comes before.",
)


def _has_pairs(ds: xr.Dataset) -> bool:
    if suiting.axis(ds) is not None or "component_change" not in ds:
        return False
    cases = [{*case} for case in sites_of(ds) if all(isinstance(site, Head) for site in case)]
    single = set().union(*(case for case in cases if len(case) == 1))
    return any(len(case) == 2 and case <= single for case in cases)


NEED = Need(
    "heads ablated alone and in pairs, with every component's change, as in `interactions`", _has_pairs
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two maps for each store: interactions of pairs, and who repairs whom.

    `datasets` is a store of the interactions recipe, a sequence of them, or a mapping from title to them. Raises
    UsageError as `interactions` does.
    """
    found = {name: interactions(ds, share) for name, ds in style.named(datasets).items()}
    figure = style.new_figure(9.6, 1.2 + 4.2 * len(found))
    panels = figure.subplots(len(found), 2, squeeze=False)
    for row, (name, pairs) in zip(panels, found.items(), strict=True):
        prefix = "" if len(found) == 1 else f"{name}: "
        _draw_pairs(figure, row[0], pairs)
        row[0].set_title(f"{prefix}interaction of two heads")
        _draw_responses(figure, row[1], pairs)
        row[1].set_title("who repairs whom")
    style.heading(figure, found)
    top = among(share, *found.values())
    facts = [
        f"{'' if len(found) == 1 else name + ': '}{line}" for name, ds in found.items() for line in told(ds)
    ]
    reading = [line.format(top=top, rate=RATE, additive=ADDITIVE) for line in READING]
    style.caption(figure, found, [*facts, *reading])
    return figure


def told(pairs: xr.Dataset) -> list[str]:
    """What the means of a summary of joint runs are over, where its heads were found, and how well they are known."""
    name = "interaction" if "interaction" in pairs else "change"
    where = wording.selection(pairs) or ["heads found on the prompts that are shown, or named"]
    if "relation" in pairs:
        counts = [(int((pairs.relation.values == kind).sum()), kind) for kind in RELATIONS]
        where.append("pairs: " + ", ".join(f"{count} {kind}" for count, kind in counts))
    facts = f"{pairs.attrs['prompts']} prompts, {pairs.attrs['tokens_each']} tokens each"
    task = [f"{style.capital(line)}." for line in wording.task(pairs)]
    return [
        f"{facts}. {'. '.join(map(style.capital, where))}.",
        f"{style.capital(wording.intervals(pairs, name))}.",
        *task,
    ]


def _draw_pairs(figure: Figure, axes: Axes, pairs: xr.Dataset) -> None:
    heads = [str(head) for head in pairs["head"].values]
    values = np.full((len(heads), len(heads)), np.nan)
    marks, widths = np.full(values.shape, "", object), np.full(values.shape, np.inf)
    for first, second, value, width, relation in zip(
        pairs["first"].values,
        pairs["second"].values,
        pairs.interaction.values,
        pairs[f"interaction{HALF_WIDTH}"].values,
        pairs.relation.values,
        strict=True,
    ):
        place = heads.index(str(second)), heads.index(str(first))
        values[place] = values[place[::-1]] = value
        marks[place] = marks[place[::-1]] = MARKS[str(relation)]
        widths[place] = widths[place[::-1]] = width
    _map(figure, axes, values, heads, "interaction (logits)")
    most, decimals = np.nanmax(abs(values)), style.decimals(values)
    for row, column in np.argwhere(marks != ""):
        value = values[row, column]
        text = f"{_cell(value, widths[row, column], decimals)}\n{marks[row, column]}"
        look = {"ha": "center", "va": "center", "fontsize": _size(heads), "linespacing": 1.0}
        axes.text(column, row, text, color=_ink(float(value), float(most)), **look)


def _draw_responses(figure: Figure, axes: Axes, pairs: xr.Dataset) -> None:
    heads = [str(head) for head in pairs["head"].values]
    values = pairs.response.where(pairs.response != 0).values
    known = pairs.response_known.values
    image = _map(figure, axes, values, heads, "change of direct effect (logits)")
    image.set_alpha(np.where(known | np.isnan(values), 1.0, 0.3))
    most, decimals = np.nanmax(abs(values)) if np.isfinite(values).any() else 1, style.decimals(values)
    for row, column in np.argwhere(np.isfinite(values)):
        value, sure = values[row, column], known[row, column]
        ink = _ink(float(value), float(most)) if sure else "#777777"
        text = _cell(value, pairs[f"response{HALF_WIDTH}"].values[row, column], decimals)
        look = {"ha": "center", "va": "center", "fontsize": _size(heads), "linespacing": 1.0}
        axes.text(column, row, text, color=ink, **look)
    axes.set_xlabel("changes")
    axes.set_ylabel("ablated")


def _map(figure: Figure, axes: Axes, values: np.ndarray, heads: list[str], label: str):
    most = float(np.nanmax(abs(values), initial=0)) or 1e-6
    image = axes.imshow(np.ma.masked_invalid(values), cmap=COLOURS, vmin=-most, vmax=most)
    axes.grid(False)
    axes.set_xticks(range(len(heads)), heads, rotation=90 if len(heads) > 6 else 0)
    axes.set_yticks(range(len(heads)), heads)
    figure.colorbar(image, ax=axes, label=label, shrink=0.85).outline.set_visible(False)
    return image


def _cell(value: Any, width: Any, decimals: int) -> str:
    known = f"\n± {width:.{decimals}f}" if np.isfinite(width) else ""
    return f"{style.signed(float(value), decimals)}{known}"


def _size(heads: list[str]) -> float:
    """Of letters in a cell."""
    return style.LABEL if len(heads) <= FEW else style.LABEL * FEW / len(heads)


def _ink(value: float, most: float) -> str:
    return "white" if abs(value) > DARK * most else "black"
