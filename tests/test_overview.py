"""The overview of a store, its summary and its figures, is there whatever the store holds: any axis, any cases."""

import numpy as np
import pytest
from made import AXES, CASES, any_store
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.report import render
from selfrepair_nn.wording import WIDTH

STATES = {
    "whole": {},
    "one prompt": {"prompts": 1},
    "one token": {"prompts": 1, "positions": 1},
    "many prompts": {"prompts": 25, "positions": 3},
    "interrupted": {"done": np.arange(3) < 1},
    "all zero": {"size": 0.0},
    "huge": {"size": 1e30},
    "beyond any number": {"size": 1e200},
    "tiny": {"size": 1e-30},
    "few count": {"counted": np.arange(3) < 1},
    "edited": {"edited": True},
}
"""What a store can be like, whatever its cases and its axis."""

EVERY = [(cases, axis) for cases in (None, *CASES) for axis in AXES]
ALONE = [(cases, axis) for cases, axis in EVERY if cases is None or axis is None]


def kinds_of(state):
    """Every eleventh of all kinds, from another one on for each state, so that together the states have all of them."""
    return EVERY[list(STATES).index(state) :: len(STATES)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "kinds", [kinds_of, pytest.param(lambda _: EVERY, marks=pytest.mark.thorough)], ids=["some", "all"]
)
def test_every_store_has_a_summary_of_one_screen(kinds, state):
    for cases, axis in kinds(state):
        lines = str(sr.summary(any_store(cases, axis, **STATES[state]))).splitlines()
        assert lines[0].startswith("made, "), (cases, axis)
        assert "nothing is done yet" not in lines, (cases, axis)
        assert max(map(len, lines)) <= WIDTH, (cases, axis)
        assert len(lines) <= 50, (cases, axis)


@pytest.mark.parametrize(
    "state", representative(STATES, "whole", "interrupted", "one token", "beyond any number")
)
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.thorough)], ids=["some", "all"])
def test_every_store_of_cases_and_of_variants_is_drawn(every, state):
    for cases, axis in kinds_of(state)[::every]:
        ds = any_store(cases, axis, **STATES[state])
        names = figures.suited(ds)
        assert names, (cases, axis)
        for name in names:
            figure = figures.draw(name, ds)
            figure.set_dpi(30)
            figure.canvas.draw()


def test_every_state_of_every_kind_of_store_is_suited_to_the_overview():
    for cases, axis in EVERY:
        for state in STATES.values():
            ds = any_store(cases, axis, **state)
            expected = "variants" if axis else "cases"
            reads_itself = axis == "scale" and "edited" in state and cases is None
            single = cases is None and axis is None
            assert figures.FIGURES[expected].suits(ds) == (not reads_itself and not single), (cases, axis)
            assert figures.own(ds)


OF_PAGES = [("pairs", None), ("mixed", "dose"), (None, "last mlp")]


@pytest.mark.parametrize("kind", representative(OF_PAGES, ("mixed", "dose")), ids=str)
def test_a_page_of_any_store(kind, no_figures):
    for state in STATES.values():
        assert "<h2>Summary</h2>" in render(any_store(*kind, **state))


@pytest.mark.parametrize(
    "kinds", [ALONE, pytest.param(EVERY, marks=pytest.mark.thorough)], ids=["some", "all"]
)
def test_nothing_done_is_said(kinds):
    for cases, axis in kinds:
        assert "nothing is done yet" in str(sr.summary(any_store(cases, axis, done=False)))
