"""Who takes over when a set of heads is gone: each further head's effect given the set, beside its effect alone."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, KNOWN_BACKUPS, SHARE, among, backup_roc, conditional_effects
from selfrepair_nn.analysis.taking_over import the_set
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures import style, suiting

SHOWN = 12
READING = (
    "Means on the set's {top}, 95% intervals. Left: below the diagonal a head costs more once the set is "
    "gone: it takes "
    "over. Right: the {shown} largest of that, of all {count} heads.",
    "Filled: backups: surely above 0 (false discovery rate {rate:.0%} over all heads) and the noise floor, and needed "
    "without the set.",
)


def _has_set(ds: xr.Dataset) -> bool:
    cases = sites_of(ds)
    shared, every = the_set(cases), [{*case} for case in cases]
    further = [case for case in every if len(case) == 1 and not case <= shared and case | shared in every]
    heads = all(isinstance(site, Head) for case in cases for site in case)
    return suiting.axis(ds) is None and heads and bool(shared) and shared in every and len(further) > 1


NEED = Need(
    "a set of heads ablated, and with each further head, which are ablated alone too, as in `backups`",
    _has_set,
)


@figure(*NEED, name=__name__, about=__doc__, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a row for each store: all further heads, those that take over most, and the ROC where backups are known.

    `datasets` is a store of the backups recipe, a sequence of them, or a mapping from title to them. Raises UsageError
    as `conditional_effects` does.
    """
    stores = style.named(datasets)
    found = {name: conditional_effects(ds, share) for name, ds in stores.items()}
    curves = {name: curve for name, ds in stores.items() if (curve := _curve(ds, share)) is not None}
    width = 3 if curves else 2
    figure = style.new_figure(4.9 * width, 1.3 + 4 * len(found))
    panels = figure.subplots(len(found), width, squeeze=False)
    for row, (name, ds) in zip(panels, found.items(), strict=True):
        _draw_plane(row[0], ds, style.unit_of(found))
        _draw_most(row[1], ds, style.unit_of(found))
        row[0].set_title(f"{'' if len(found) == 1 else name + ': '}without {_short(ds.attrs['set'])}")
        row[1].set_title("who takes over")
        if width == 3:
            _draw_curve(row[2], curves.get(name))
    style.heading(figure, found)
    facts = [
        f"{'' if len(found) == 1 else name + ': '}{line}" for name, ds in found.items() for line in _told(ds)
    ]
    most = max(ds.sizes["head"] for ds in found.values())
    words = {"top": among(share, *found.values()), "shown": SHOWN, "count": most, "rate": RATE}
    style.caption(figure, found, [*facts, *(line.format(**words) for line in READING)])
    return figure


def _curve(ds: xr.Dataset, share: float) -> xr.Dataset | None:
    """The ROC of a store whose model's backups are known; None of others."""
    if str(ds.attrs.get("model", "")).rpartition("/")[2] not in KNOWN_BACKUPS or "other" not in ds:
        return None
    try:
        return backup_roc(ds, share=share)
    except UsageError:
        return None


def _short(labels: str) -> str:
    heads = labels.split("+")
    return ", ".join(heads[:4]) + (f" and {len(heads) - 4} more" if len(heads) > 4 else "")


def _told(ds: xr.Dataset) -> list[str]:
    where = wording.selection(ds) or ["the set found on the prompts that are shown, or named"]
    change, width = ds.attrs["set_logit_change"], ds.attrs["set_logit_change_half_width"]
    what = wording.change(ds).removesuffix(" change")
    lost = f"the set's own ablation changes the {what} by {wording.number(change)}"
    backups = f"backups: {int(ds.backup.sum())} of {int(ds.p_value.notnull().sum())} heads"
    facts = f"{ds.attrs['prompts']} prompts, {ds.attrs['tokens_each']} tokens"
    told = [facts, *where, f"{lost} {wording.reach(width)}", backups, wording.intervals(ds, "takes_over")]
    return [
        ". ".join(style.capital(each.strip()) for each in told) + ".",
        *(f"{style.capital(line)}." for line in wording.task(ds)),
    ]


def _draw_plane(axes: Axes, ds: xr.Dataset, unit: str) -> None:
    x, y, sure = ds.alone.values, ds.conditional.values, ds.backup.values
    style.crosses(axes, x, y, ds[f"alone{HALF_WIDTH}"].values, ds[f"conditional{HALF_WIDTH}"].values)
    for some, face in ((sure, style.COLOURS[0]), (~sure, "none")):
        axes.scatter(
            x[some], y[some], s=20, facecolor=face, edgecolor=style.COLOURS[0], linewidth=0.8, zorder=3
        )
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    axes.plot([low, high], [low, high], color="black", linewidth=0.8, zorder=1.5)
    axes.set_xlabel(f"{wording.change(ds)}, ablated alone ({unit})")
    axes.set_ylabel(f"{wording.change(ds)} beside the set, less the set's ({unit})")


def _draw_most(axes: Axes, ds: xr.Dataset, unit: str) -> None:
    shown = ds.isel(head=np.argsort(-ds.takes_over.values, kind="stable")[:SHOWN])
    rows, sure, colour = np.arange(shown.sizes["head"]), shown.backup.values, style.COLOURS[0]
    axes.errorbar(
        shown.takes_over.values,
        rows,
        xerr=style.bars(shown[f"takes_over{HALF_WIDTH}"].values),
        fmt="none",
        ecolor=colour,
    )
    for some, face in ((sure, colour), (~sure, "white")):
        axes.plot(shown.takes_over.values[some], rows[some], "o", color=colour, markerfacecolor=face)
    axes.axvline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.set_yticks(rows, [str(head) for head in shown["head"].values])
    axes.set_ylim(rows.size - 0.5, -0.5)
    axes.set_xlabel(f"alone less beside the set ({unit})")


def _draw_curve(axes: Axes, curve: xr.Dataset | None) -> None:
    if curve is None:
        axes.set_axis_off()
        return
    axes.step(
        curve.false_positive_rate.values,
        curve.true_positive_rate.values,
        where="post",
        color=style.COLOURS[0],
    )
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.set_xlabel("share of other heads")
    axes.set_ylabel("share of known backups")
    width = wording.reach(curve.attrs["auc_half_width"])
    axes.set_title(f"known backups: AUC {curve.attrs['auc']:.2f} {width}".strip())
