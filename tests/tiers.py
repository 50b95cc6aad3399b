"""Which cases of a test are in every run of the tests, and which in thorough ones only."""

from collections.abc import Iterable

import pytest


def representative(cases: Iterable, *chosen: object) -> list:
    """All `cases` as parameters of a test, marked as thorough but for the `chosen`, which must be among them."""
    cases = list(cases)
    if missing := [each for each in chosen if each not in cases]:
        raise ValueError(f"no such case: {missing}; choose of {cases}")
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.thorough) for case in cases]
