"""Blocks of layers deleted, in another order, side by side: how much of what a block does each of these keeps."""

from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.interactions import columns, ratio
from selfrepair_nn.analysis.joint import Joint, require_joint
from selfrepair_nn.components import Layers, Parallel, Permuted
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

KINDS = {Permuted: "reordered", Parallel: "additive"}


@public
def composition(ds: xr.Dataset) -> xr.Dataset:
    """How much of what a block of layers does is kept where they stand side by side, or run in another order.

    Over (case), of every block that is deleted in another run too; means over all tokens that count, with
    x_half_width of each:

    - logit_kept = 1 - mean logit_change / mean logit_change of the deleted block: the share of the block's effect on
      the logit that is left, no unit; NaN where the interval of the deleted block's holds 0;
    - stream_distance: mean distance of the stream behind the block from the clean one, in lengths of what the block
      writes: 0 where nothing moved, 1 as far as deleted;
    - logit_change, and deleted: that of the deleted block, in logits.

    kind is "additive" or "reordered", layer and stop are the block's. Over (kind): all_logit_kept, of all its blocks
    together (the ratio of sums), and all_stream_distance, the mean over blocks. Additive against sequential composition
    is one number there. Definitions: docs/definitions.md.

    Raises:
        UsageError: `ds` has no such blocks, or stream_distance was not recorded: run layer_order.
    """
    joint = Joint.of(require_joint(ds, "layer_order", "stream_distance"), 1.0)
    deleted = {
        (s.layer, s.stop): i for i, case in enumerate(joint.cases) for s in case if isinstance(s, Layers)
    }
    moved = [i for i, case in enumerate(joint.cases) if type(case[0]) in KINDS and _block(case) in deleted]
    if not moved:
        raise UsageError(
            "this store has no block of layers that is both deleted and composed anew: run layer_order"
        )
    gone = [deleted[_block(joint.cases[i])] for i in moved]
    change, without = (joint.combined("logit_change", on, [[(1, c)] for c in on]) for on in (moved, gone))
    distance = joint.combined("stream_distance", moved, [[(1, c)] for c in moved])
    found = {"logit_kept": _kept(change, without), "stream_distance": distance.estimate}
    found |= {"logit_change": change.estimate, "deleted": without.estimate}
    kinds = np.array([KINDS[type(joint.cases[i][0])] for i in moved], object)
    variables = columns("case", found) | _together(kinds, change, without, distance.estimate)
    sites = [joint.cases[i][0] for i in moved]
    labels: Any = {"case": [site.label for site in sites], "kind": [*KINDS.values()]}
    labels |= {name: ("case", [getattr(site, name) for site in sites]) for name in ("layer", "stop")}
    labels["composed"] = ("case", kinds)
    return _described(xr.Dataset(variables, labels, joint.told()))


def _block(case: Any) -> tuple[int, int]:
    return case[0].layer, case[0].stop


def _kept(change: Tally, without: Tally) -> Estimate:
    lost = ratio(change, without)
    return Estimate(1 - lost.mean, lost.influence, lost.shares)


def _together(kinds: np.ndarray, change: Tally, without: Tally, distance: Estimate) -> dict[str, Any]:
    """Of all cases of each kind."""
    index = np.array([[*KINDS.values()].index(kind) for kind in kinds])
    pooled = [_pooled(tally, index) for tally in (change, without)]
    found = {"all_logit_kept": _kept(*pooled), "all_stream_distance": distance.of_groups(index, len(KINDS))}
    return columns("kind", found)


def _pooled(tally: Tally, index: np.ndarray) -> Tally:
    sums, counts = (
        np.stack([each[index == i].sum(0) for i in range(len(KINDS))]) for each in (tally.sums, tally.counts)
    )
    return Tally(sums, counts)


def _described(found: xr.Dataset) -> xr.Dataset:
    names = {
        "logit_kept": ("1", "share of the block's effect on the logit that is kept"),
        "stream_distance": ("1", "mean distance of the stream, in lengths of what the block writes"),
        "logit_change": ("logit", "mean logit change"),
        "deleted": ("logit", "mean logit change with the block deleted"),
    }
    names |= {
        f"all_{name}": (units, f"{told}, all blocks") for name, (units, told) in list(names.items())[:2]
    }
    for name, (units, told) in names.items():
        found[name].attrs = {"units": units, "long_name": told}
        found[f"{name}_half_width"].attrs = {
            "units": units,
            "long_name": f"half-width of the 95% interval of {told}",
        }
    return found
