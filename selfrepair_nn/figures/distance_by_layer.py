"""How far each head lies from y = -x, no repair, by layer: over all tokens and over its top tokens."""

from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among, every_token, throughout
from selfrepair_nn.choosing import against_of
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import beyond, depth, style, suiting

DISTANCES = {
    "removed": (
        "removed_distance",
        "Distance: (logit change + direct effect removed) / √2 = self-repair / √2. Of a head of positive direct "
        "effect, above zero is repaired, below zero is broken.",
    ),
    "direct-effect": (
        "distance",
        "Distance: (logit change + direct effect) / √2, which has in it what the head writes when it is ablated. Of a "
        "head of positive direct effect, above zero is repaired, below zero is broken.",
    ),
}
IN_NATS = (
    "Distance: (log-probability change + own effect on log-probability) / √2 = self-repair / √2. Of a head whose own "
    "write takes from it, above zero is repaired, below zero is broken."
)
READING = (
    "Lines: means of each layer, with their 95% intervals. Dots: attention heads{typical}; hollow where the interval "
    "holds zero or there is none, or under the noise floor (grey band where it is wide enough to be seen).",
)


@figure(*suiting.HEADS_ALONE, name=__name__, about=__doc__, of_summary=True, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two panels, means over all tokens and over the top share; several stores by depth in percent.

    Distances are against what the ablation removed, or the direct effect, as `plot` was asked, the same for all stores:
    if not asked, what was removed, unless nothing takes the head's place in any.

    `datasets` is a store or a summary of `by_head`, a sequence of them, or a mapping from legend to them.
    Raises UsageError as `by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share)
    unit = style.unit_of(found)
    figure = style.new_figure(9.6 if len(found) == 1 else 11, 4.0)
    kind = "removed" if "removed" in map(against_of, found.values()) else "direct-effect"
    distance, told = DISTANCES[kind]
    tokens = {distance: throughout(*found.values())} if all(map(every_token, found.values())) else {}
    tokens |= {f"top_{distance}": among(share, *found.values())} if share < 1 or not tokens else {}
    panels = figure.subplots(1, len(tokens), squeeze=False)[0]
    drawn = []
    for axes, (name, title) in zip(panels, tokens.items(), strict=True):
        depth.name_axis(axes, len(found) == 1)
        dots = depth.draw_heads(axes, found, name, share)
        drawn.append((axes, dots, beyond.settle(axes, dots)))
        depth.draw_noise(axes, found)
        axes.set_title(title)
        axes.set_ylabel(f"distance from y = \N{MINUS SIGN}x ({unit})")
    style.heading(figure, found)
    style.legend(figure, panels[0], found)
    told = IN_NATS if unit == "nats" else told
    reading = [told, *(depth.told(line, found, f"top_{distance}") for line in READING)]
    reading += beyond.told(*(axis for *_, axis in drawn))
    style.caption(figure, found, [*style.captions(found, of=f"top_{distance}"), *reading])
    style.lay_out(figure)
    for each in drawn:
        beyond.name(*each)
    return figure
