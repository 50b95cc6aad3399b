"""How far each head lies from y = -x, no repair, by layer: over all tokens and over its top tokens."""

from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import SHARE, among, every_token, throughout
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import depth, style, suiting

READING = (
    "Distance: ({change} + {effect}) / √2. Of a head of positive direct effect, above zero is repaired, "
    "below zero is broken.",
    "Lines: means of each layer, with their 95% intervals. Dots: attention heads{typical}; hollow where the interval "
    "holds zero or there is none, or under the noise floor (grey band where it is wide enough to be seen).",
)


@figure(*suiting.HEADS_ALONE, name=__name__, about=__doc__, of_summary=True, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two panels, means over all tokens and over the top share; several stores by depth in percent.

    `datasets` is a store or a summary of `by_head`, a sequence of them, or a mapping from legend to them.
    Raises UsageError as `by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share)
    unit, first = style.unit_of(found), next(iter(found.values()))
    figure = style.new_figure(9.6 if len(found) == 1 else 11, 4.0)
    tokens = {"distance": throughout(*found.values())} if all(map(every_token, found.values())) else {}
    tokens |= {"top_distance": among(share)} if share < 1 or not tokens else {}
    panels = figure.subplots(1, len(tokens), squeeze=False)[0]
    for axes, (name, told) in zip(panels, tokens.items(), strict=True):
        depth.name_axis(axes, len(found) == 1)
        depth.draw_heads(axes, found, name, share)
        depth.draw_noise(axes, found)
        axes.set_title(told)
        axes.set_ylabel(f"distance from y = \N{MINUS SIGN}x ({unit})")
    style.heading(figure, found)
    style.legend(figure, panels[0], found)
    axes_of = {"change": wording.change(first), "effect": wording.effect(first)}
    reading = [depth.told(line, found, "top_distance", **axes_of) for line in READING]
    style.caption(figure, found, [*style.captions(found, of="top_distance"), *reading])
    return figure
