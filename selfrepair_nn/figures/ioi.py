"""Name movers ablated one by one and together: what is lost, and which heads back up (section 5.3.1)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, SHARE, backups, name_movers
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting
from selfrepair_nn.wording import intervals

BAR = 0.36
READING = (
    "Left: the direct effect that is taken away, and what the logit difference loses; if less, the others repair.",
    "Right: the heads that rise most when the name movers are ablated together. Orange: the layers from {first}'s",
    "to their own are deleted, so that they read what {first} reads. Means on the tokens that count, 95% intervals; of "
    "what is ablated, those of the change against clean.",
)
LOOKS = {
    "direct_effect": ("clean", "#8A8A8A", "o"),
    "joint": ("name movers ablated", style.COLOURS[0], "s"),
    "moved": ("reading what the name mover reads", style.COLOURS[1], "D"),
}

NEED = Need(
    "heads ablated one by one and together, and a second token, as in `ioi`",
    lambda ds: _together(ds) and {"other", "component_change", "counted"} <= {*ds.variables},
)


def _together(ds: xr.Dataset) -> bool:
    return suiting.axis(ds) is None and any(len(case) > 1 for case in sites_of(ds))


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a row for each store of the ioi recipe: the ablations, and the heads that back up.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Only the tokens that count are
    shown: there is no top share. Raises UsageError as `name_movers` does.
    """
    found = {name: (name_movers(ds), backups(ds)) for name, ds in style.named(datasets).items()}
    figure = style.new_figure(10.5, 1.3 + 3.4 * len(found))
    style.space(figure, w_pad=0.12, h_pad=0.1)
    panels = figure.subplots(len(found), 2, squeeze=False)
    for row, (name, (movers, rising)) in zip(panels, found.items(), strict=True):
        _draw_movers(row[0], movers)
        _draw_backups(row[1], rising)
        prefix = "" if len(found) == 1 else f"{name}: "
        row[0].set_title(f"{prefix}name movers ablated")
        row[1].set_title("heads that back up")
    style.heading(figure, {name: movers for name, (movers, _) in found.items()})
    facts = [
        f"{'' if len(found) == 1 else name + ': '}{fact}"
        for name, (movers, _) in found.items()
        for fact in (_facts(movers), *(f"{style.capital(line)}." for line in _told(movers)))
    ]
    first = ", ".join(dict.fromkeys(str(movers.case.values[0]) for movers, _ in found.values()))
    shown = {name: movers for name, (movers, _) in found.items()}
    told = "; ".join(dict.fromkeys(intervals(movers, "logit_change") for movers in shown.values()))
    reading = [line.format(first=first) for line in READING]
    style.caption(figure, shown, [*facts, f"{style.capital(told)}.", *reading])
    return figure


def _draw_movers(axes: Axes, movers: xr.Dataset) -> None:
    shown = movers.isel(case=np.flatnonzero(movers.kind.values != "moved"))
    rows = np.arange(shown.sizes["case"])
    taken, lost = shown.direct_effect - shown.ablated_direct_effect, -shown.logit_change
    look = {"height": BAR, "error_kw": {"elinewidth": 1, "ecolor": "#333333"}, "zorder": 3}
    widths = (style.bars(shown[name + HALF_WIDTH].values) for name in ("removed", "logit_change"))
    axes.barh(
        rows - BAR / 2, taken, xerr=next(widths), color="#B5B5B5", label="direct effect taken away", **look
    )
    axes.barh(rows + BAR / 2, lost, xerr=next(widths), color=style.COLOURS[0], label="lost", **look)
    axes.axvline(0, color="black", linewidth=0.8, zorder=4)
    axes.set_yticks(rows, ["\n".join(site.label for site in case) for case in sites_of(shown)])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("logit of the indirect object \N{MINUS SIGN} of the subject")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.1), ncols=2, borderaxespad=0)


def _draw_backups(axes: Axes, rising: xr.Dataset) -> None:
    rows = np.arange(rising.sizes["rank"])
    for offset, (name, (label, colour, marker)) in zip((-0.2, 0, 0.2), LOOKS.items(), strict=True):
        look = {"fmt": marker, "markersize": 5, "color": colour, "elinewidth": 1, "zorder": 3}
        width = style.bars(rising[name + HALF_WIDTH].values)
        axes.errorbar(rising[name].values, rows + offset, xerr=width, label=label, **look)
    axes.axvline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.set_yticks(rows, [str(label) for label in rising.component.values])
    axes.invert_yaxis()
    axes.set_xlabel("direct effect on that difference (logits)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.1), ncols=3, borderaxespad=0, handletextpad=0.1)


def _told(movers: xr.Dataset) -> list[str]:
    """Where name movers and backups were selected, if on other prompts than these; whether the model does the task."""
    told = wording.selection(movers) or ["selected on the prompts that are shown; --param found_on=half takes others"]
    return [*(f"Name movers and backups: {each}" for each in told), *wording.task(movers)]


def _facts(movers: xr.Dataset) -> str:
    prompts, clean = movers.attrs["prompts"], movers.attrs["logit_difference"]
    joint = movers.isel(case=np.flatnonzero(movers.kind.values == "joint"))
    kept = f", on {style.shown_share(joint.isel(case=0), 'correct')} without the name movers" if joint.case.size else ""
    above = f"{wording.number(clean)} {wording.reach(movers.attrs['logit_difference' + HALF_WIDTH])}".strip()
    whole = xr.Dataset({name: movers.attrs[name] for name in ("clean_correct", "clean_correct" + HALF_WIDTH)})
    return (
        f"{prompts} prompts. In the clean run the indirect object's logit is {above} above the "
        f"subject's, and higher on {style.shown_share(whole, 'clean_correct')}{kept}."
    )
