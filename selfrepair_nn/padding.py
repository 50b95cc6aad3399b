"""Rows of unequal length in one array: behind a row's own tokens stands filler, which nothing counts."""

from collections.abc import Sequence

import numpy as np

ALIKE = 10
"""Rows that lend to one another, at least: so many have more derangements (over a million) than a run asks for."""


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as one array, int64 [row, position], and how many of each are its own, int64 [row]."""
    lengths = np.array([len(row) for row in rows], np.int64)
    wide = [np.pad(row, (0, lengths.max() - len(row)), "edge") for row in rows]
    return np.array(wide, np.int64), lengths


def filled(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The same [row, position], each row's last own entry in place of its filler: an id that a model surely reads."""
    last = np.minimum(np.arange(ids.shape[1]), lengths[:, None] - 1)
    return np.take_along_axis(ids, last, 1)


def within(lengths: np.ndarray, width: int) -> np.ndarray:
    """Which of so many positions are among the first `lengths` of each row: bool [row, position]."""
    return np.arange(width) < np.asarray(lengths)[:, None]


def alike(lengths: np.ndarray) -> list[np.ndarray]:
    """The rows in groups of like length, at least 10 in each where there are so many: indices, ascending, of each.

    Rows of one length are in one group.
    """
    order = np.argsort(lengths, kind="stable")
    ends, begin = [], 0
    for end in range(1, len(order)):
        if end - begin >= ALIKE and len(order) - end >= ALIKE and lengths[order[end]] != lengths[order[end - 1]]:
            ends, begin = [*ends, end], end
    return [np.sort(group) for group in np.split(order, ends)]
