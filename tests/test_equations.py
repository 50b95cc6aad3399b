"""Equations 1 and 2 and Appendix B on numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrepair_nn.equations import complete


def measured(**values):
    one = {"logit": 5.0, "target_constant": 1.0, "norm_scale": 2.0, "direct_effect": 3.0}
    one |= {"ablated_direct_effect": 0.5, "logit_change": -1.0, "from_heads": 0.25, "from_mlps": 0.75}
    one |= {"ablated_norm_scale": 1.6}
    return {name: np.full((1, 1) if name in ("logit", "target_constant", "norm_scale") else (1, 1, 1), value)
            for name, value in (one | values).items()}  # fmt: skip


def test_by_hand():
    """R = 4, own change -2.5, R' = 4 - 2.5 + 1 = 2.5, S/S' - 1 = 0.25."""
    found = {name: value.item() for name, value in complete(measured()).items()}
    assert found["self_repair"] == pytest.approx(-1.0 + 2.5)
    assert found["from_norm"] == pytest.approx(0.25 * 2.5)
    assert found["norm_on_existing"] == pytest.approx(0.25 * 4)
    assert found["norm_on_change"] == pytest.approx(0.25 * -1.5)
    assert found["closure"] == pytest.approx(1.5 - (0.25 + 0.75 + 0.625))


def test_an_untouched_norm_repairs_nothing():
    found = complete(measured(ablated_norm_scale=2.0))
    assert found["from_norm"].item() == 0


def test_a_missed_component_shows_in_the_closure():
    """The logit's change is the truth; leaving 0.1 out of the parts must leave S/S' times 0.1 over."""
    consistent = (2.0 / 1.6) * 2.5 - 4
    whole = complete(measured(logit_change=consistent))
    missed = complete(measured(logit_change=consistent, from_heads=0.15))
    assert whole["closure"].item() == pytest.approx(0)
    assert missed["closure"].item() == pytest.approx(1.25 * 0.1)


numbers = st.floats(-10, 10)


@given(numbers, numbers, numbers, numbers, numbers, st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_parts_add_up_whenever_the_logit_is_their_sum(
    before, after, heads, mlps, effects, scale, ablated
):
    ends = effects + after - before + heads + mlps
    values = {"direct_effect": before, "ablated_direct_effect": after, "from_heads": heads, "from_mlps": mlps}
    values |= {"logit": effects + 1.0, "norm_scale": scale, "ablated_norm_scale": ablated}
    found = complete(measured(logit_change=ends * scale / ablated - effects, **values))
    assert found["closure"].item() == pytest.approx(0, abs=1e-8)
    assert (found["norm_on_existing"] + found["norm_on_change"]).item() == pytest.approx(
        found["from_norm"].item()
    )
