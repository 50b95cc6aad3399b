"""How freezing each later norm changes the self-repair of the strongest heads (section 5.2)."""

from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import changes, style, suiting

READING = (
    "Each norm by itself keeps its clean scale; all: all of them together. Below zero: freezing it takes "
    "self-repair away. Bars: 95% intervals, token by token against nothing frozen."
)

NEED = Need("norms frozen one by one, as in `freeze_norms`", lambda ds: suiting.first(ds, "norm"))


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw for each store of the freeze_norms recipe the change of self-repair, norm by norm.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as `differences` does,
    and if there is nothing to draw.
    """
    return changes.draw(datasets, share, "change of self-repair", READING)
