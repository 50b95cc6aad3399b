"""Self-repair by stage of inference: of what is ablated, and of what makes up for it."""

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, by_head, by_stage
from selfrepair_nn.analysis.stages import single_sites
from selfrepair_nn.analysis.summaries import by_case
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting
from selfrepair_nn.wording import each_heads

COLOURS = colormaps["RdBu"].with_extremes(bad="#F2F2F2")
READING = (
    "Rows: stage of what is ablated; columns: stage of what changes its direct effect, and the norm. "
    "Means over the ablated "
    "components of the stage, each on {tokens}; ± is the 95% interval, pale where it holds 0.",
    "A row adds up to its self-repair. The borders of stages are a choice, read off another paper's figures: "
    "sr.by_stage(dataset, stages=…) takes others.",
)
NORMS = {
    "from_post_norms": "norms behind\nattention",
    "from_norm": "final norm",
    "self_repair": "all:\nself-repair",
}
PALE, DARK, STAGE = 0.3, 0.55, 14  # the last: characters in a line of a stage's name


def _one_by_one(ds: xr.Dataset) -> bool:
    return (
        "component_change" in ds and "position" in ds.dims and suiting.axis(ds) is None and single_sites(ds)
    )


NEED = Need(
    "heads or sublayers ablated one by one, with every component's change (--components)", _one_by_one
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a map for each store.

    `datasets` is a store with component changes, a sequence of them, or a mapping from title to them. Raises UsageError
    as `by_stage` does.
    """
    stores = style.named(datasets)
    found = {name: by_stage(ds, share=share) for name, ds in stores.items()}
    figure = style.new_figure(9.6, 1.2 + 3.4 * len(found))
    for axes, (name, stages) in zip(
        figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True
    ):
        _draw_stages(figure, axes, stages)
        axes.set_title("" if len(found) == 1 else name)
    style.heading(figure, found)
    summaries = {
        n: by_case(ds, share) if "case" in ds.dims else by_head(ds, share) for n, ds in stores.items()
    }
    reading = [line.format(tokens=each_heads(next(iter(summaries.values())), "its")) for line in READING]
    style.caption(figure, found, [*style.captions(summaries), *reading])
    return figure


def _draw_stages(figure: Figure, axes: Axes, stages: xr.Dataset) -> None:
    norms = [name for name in NORMS if name in stages]
    values, widths = (
        np.column_stack([stages[f"repair{end}"].values, *(stages[n + end].values for n in norms)])
        for end in ("", HALF_WIDTH)
    )
    reached = np.column_stack([_reached(stages), np.ones((len(values), len(norms)), bool)]) & np.isfinite(
        values
    )
    shown = np.where(reached, values, np.nan)
    most = float(np.nanmax(abs(shown), initial=0)) or 1e-6
    sure, decimals = abs(values) > widths, style.decimals(shown)
    look = {"cmap": COLOURS, "vmin": -most, "vmax": most, "aspect": "auto"}
    image = axes.imshow(shown, alpha=np.where(sure | ~reached, 1, PALE), **look)
    for row, column in np.argwhere(reached):
        value, width = values[row, column], widths[row, column]
        told = style.signed(float(value), decimals) + (f"\n± {width:.{decimals + 1}f}" if np.isfinite(width) else "")
        ink = "white" if sure[row, column] and abs(value) > DARK * most else "black"
        axes.text(column, row, told, ha="center", va="center", fontsize=7.5, color=ink)
    names = [
        f"{style.wrapped(str(name), STAGE)}\n(layers {layers})"
        for name, layers in zip(stages.repairing.values, stages.layers.values, strict=True)
    ]
    counts = [
        f"{name}\n({count} ablated)"
        for name, count in zip(stages.ablated.values, stages.components.values, strict=True)
    ]
    axes.grid(False)
    axes.set_xticks(range(values.shape[1]), [*names, *(NORMS[n] for n in norms)], fontsize=7.5)
    axes.set_yticks(range(len(counts)), counts, fontsize=7.5)
    axes.axvline(len(names) - 0.5, color="white", linewidth=4)
    axes.set_ylabel("ablated")
    axes.set_xlabel("repairs (blue) or breaks (red)")
    figure.colorbar(image, ax=axes, label="logits", pad=0.01).outline.set_visible(False)


def _reached(stages: xr.Dataset) -> np.ndarray:
    """Which stages can respond: none before the ablated."""
    count = stages.sizes["ablated"]
    return np.arange(count)[:, None] <= np.arange(count)
