"""What the norm repairs: shares that are clipped and not, and the two parts of Appendix B."""

import numpy as np
import pytest
import xarray as xr
from made import PARTS, SWEEP, hand_made

from selfrepair_nn.analysis import by_head, by_layer, norm_by_head, top_share
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads, unfinished


@pytest.fixture(scope="module")
def part():
    done = np.arange(8) < np.array([[8, 5, 0], [1, 2, 8], [8, 8, 8], [8, 8, 8]])[..., None]
    heads = [Head(i, j) for i in range(4) for j in range(3) if (i, j) != (3, 1)]
    return unfinished(simulate_heads(4, 3, 8, 13, seed=3), heads, done)


def test_by_hand():
    parts = {"norm_on_existing": [[3, -4, 8, 3]], "norm_on_change": [[-1, 0, -1, 0]]}
    ds = hand_made([[4, 2, 0, 1]], from_norm=[[2, -4, 7, 3]], **parts)
    norm = norm_by_head(ds, 0.5).isel(layer=0, head=0)
    assert norm.norm_ratio == (0.5 - 2 + 0 + 3) / 4  # no direct effect, no share
    assert norm.top_norm_ratio == (0.5 - 2) / 2
    assert norm.norm_share == (0.5 + 0) / 2
    assert (norm.norm_on_existing, norm.top_norm_on_existing) == (2.5, -0.5)
    assert (norm.norm_on_change, norm.top_norm_on_change) == (-0.5, -0.5)


def test_means_are_the_naive_ones_on_a_partly_done_store(part):
    norm, marks = norm_by_head(part, 0.1), top_share(part, 0.1)
    counted = (part.done & part.selected).broadcast_like(part.direct_effect).transpose(*SWEEP)
    values = {name: part[name].astype(float) for name in PARTS}
    values["norm_ratio"] = part.from_norm.astype(float) / part.direct_effect
    for name, each in values.items():
        np.testing.assert_allclose(norm[name], each.where(counted).mean(SWEEP[2:]), rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(norm[f"top_{name}"], each.where(marks).mean(SWEEP[2:]), rtol=1e-6)


@pytest.mark.parametrize("prefix", ["", "top_"])
def test_the_two_parts_are_the_whole(part, prefix):
    norm = norm_by_head(part, 0.1)
    parts = sum(norm[prefix + name] for name in PARTS)
    np.testing.assert_allclose(parts, norm[f"{prefix}from_norm"], atol=1e-6)


def test_it_extends_the_summary(part):
    norm = norm_by_head(part, 0.1)
    xr.testing.assert_identical(norm[list(by_head(part, 0.1).data_vars)], by_head(part, 0.1))
    assert norm_by_head(norm, 0.1) is norm
    assert by_layer(norm, 0.1).top_norm_ratio[2] == pytest.approx(norm.top_norm_ratio[2].mean().item())
    assert all({"units", "long_name"} <= set(norm[name].attrs) for name in norm.data_vars)


def test_a_summary_without_tokens_is_refused(part):
    with pytest.raises(UsageError, match="lacks done"):
        norm_by_head(by_head(part))
    with pytest.raises(UsageError, match=r"share 0\.1, not 0\.02"):
        norm_by_head(norm_by_head(part, 0.1))
