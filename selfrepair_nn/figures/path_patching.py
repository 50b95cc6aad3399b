"""What each later part repairs of the strongest heads when it alone may react to them: path patching (section 5.2)."""

from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import changes, style, suiting

READING = (
    "Self-repair with only this receiver live, less that with only the final norm live: what it makes of the sender's "
    "change by the direct path; all: nothing frozen. Bars: 95% intervals, token by token."
)

NEED = Need("receivers one by one, as in `path_patching`", lambda ds: suiting.first(ds, "receiver"))


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw for each store of the path_patching recipe what each receiver adds to self-repair.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as `differences` does,
    and if there is nothing to draw.
    """
    return changes.draw(datasets, share, "added self-repair", READING)
