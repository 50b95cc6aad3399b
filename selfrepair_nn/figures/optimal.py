"""What heads are worth by four ablations, the optimal constant among them: loss lost, and self-repair, in nats."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, OPTIMAL, SHARE, optimal_by_head
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting

READING = (
    "Loss lost: minus the change of the log-probability of the next token, mean over all tokens that count. Left: "
    "heads, on {text}; above the line the optimal constant is better. Middle and right: means over heads. Bars: 95% "
    "intervals.",
    "The constants were learned on half of the run's text, from the mean of z, to lose least there; what they lose on "
    "the other half (held out) is what they are worth.",
)
TEXTS = {"held out": "the half held out", "run": "all of the run"}
NEED = Need(
    "heads under the optimal constant and other ablations, the log-probability of every token, as in `optimal`",
    lambda ds: ("excess" in ds and "text" in ds.dims)
    or (suiting.along(ds, "ablation", OPTIMAL, "mean") and "self_repair_logprob" in ds and suiting.every_token(ds)),
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw three panels for each store: heads by mean and optimal constant, loss by ablation, self-repair by ablation.

    `datasets` is a store or a result of `optimal_by_head`, a sequence of them, or a mapping from title to them. Raises
    UsageError as that does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, lambda ds, _: optimal_by_head(ds))
    figure = style.new_figure(11.5, 1 + 3.6 * len(found))
    grid = figure.subplots(len(found), 3, squeeze=False, gridspec_kw={"width_ratios": [1, 1.1, 1.1]})
    for (plane, loss, repair), (name, heads) in zip(grid, found.items(), strict=True):
        _draw_plane(plane, heads.isel(text=-1))
        for axes, of, label in ((loss, "loss", "loss lost (nats)"), (repair, "self_repair", "self-repair (nats)")):
            _draw_means(axes, heads, f"overall_{of}")
            axes.set_ylabel(label)
        loss.legend(loc="lower left")
        plane.set_title("heads" if len(found) == 1 else f"{name}: heads")
        loss.set_title("what the ablation costs")
        repair.set_title("self-repair")
    models = " and ".join(dict.fromkeys(str(heads.attrs["model"]) for heads in found.values()))
    style.heading(figure, found, f"{models}: optimal ablation beside others")
    style.caption(figure, found, [*dict.fromkeys(line for heads in found.values() for line in _reading(heads))])
    return figure


def _reading(heads: xr.Dataset) -> list[str]:
    one, text = heads.isel(text=-1), TEXTS[str(heads["text"].values[-1])]
    kind, count = heads.attrs["clustered_by"], heads.attrs["clusters"]
    known = f"{int((one.tokens > 0).sum())} heads, {int(one.tokens.max()):,} tokens each on {text}; "
    told = known + f"intervals are clustered by {kind} ({count} on {text})."
    return [told, READING[0].format(text=text), *READING[1 : 1 + (heads.sizes["text"] > 1)]]


def _draw_plane(axes: Axes, heads: xr.Dataset) -> None:
    known = (heads.tokens > 0).values
    parts = [heads.sel(ablation=label) for label in (OPTIMAL, "mean")]
    x, y = (one.loss.values[known] for one in parts)
    style.crosses(axes, x, y, *(one[f"loss{HALF_WIDTH}"].values[known] for one in parts))
    layer = np.broadcast_to(heads["layer"].values[:, None], known.shape)[known]
    dots = axes.scatter(x, y, c=layer, cmap=style.LAYERS, s=26, edgecolor="white", linewidth=0.4, zorder=3)
    ends = [min(x.min(), y.min(), 0), max(x.max(), y.max(), 0)]
    axes.plot(ends, ends, "k--", dashes=(5, 3), linewidth=1.1)
    axes.set_xlabel("loss lost by the optimal constant (nats)")
    axes.set_ylabel("loss lost by the mean (nats)")
    ticks = np.unique(layer) if np.ptp(layer) < 8 else None
    axes.figure.colorbar(dots, ax=axes, label="layer", pad=0.02, ticks=ticks).outline.set_visible(False)


def _draw_means(axes: Axes, heads: xr.Dataset, name: str) -> None:
    labels = [str(label) for label in heads["ablation"].values]
    for index, text in enumerate(heads["text"].values):
        one = heads.sel(text=text)
        places = np.arange(len(labels)) + 0.16 * (index - (heads.sizes["text"] - 1) / 2)
        look = {"fmt": style.marker(index), "markersize": 5.5, "elinewidth": 1.1, "color": style.colour(index)}
        axes.errorbar(places, one[name].values, style.bars(one[name + HALF_WIDTH].values), label=str(text), **look)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
