"""Each head's mean self-repair on its top tokens, by layer, with the layers' means (the paper's Figure 1)."""

from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import beyond, depth, style, suiting

READING = (
    "Lines: means of each layer, with their 95% intervals. Dots: attention heads{typical}; hollow where the interval "
    "holds zero or there is none, or under the noise floor (grey band where it is wide enough to be seen)."
)


@figure(*suiting.HEADS_ALONE, name=__name__, about=__doc__, of_summary=True, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw one store by layer index, or several by depth in percent; hollow dots may be zero.

    `datasets` is a store or a summary of `by_head`, a sequence of them, or a mapping from legend to them.
    Raises UsageError as `by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share)
    figure = style.new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    depth.name_axis(axes, len(found) == 1)
    dots = depth.draw_heads(axes, found, "top_self_repair", share)
    axis = beyond.settle(axes, dots)
    depth.draw_noise(axes, found)
    axes.set_title(style.wrapped(style.title_of(found)))
    axes.set_ylabel(f"self-repair, mean on {among(share, *found.values())} ({style.unit_of(found)})")
    style.legend(figure, axes, found)
    reading = [depth.told(READING, found, "top_self_repair"), *beyond.told(axis)]
    style.caption(figure, found, [*style.captions(found), *reading])
    style.lay_out(figure)
    beyond.name(axes, dots, axis)
    return figure
