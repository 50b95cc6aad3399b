"""Numbers made small for a page: rounded to a step that is told, whole numbers of 16 bits, compressed, in base64."""

import base64
import zlib

import numpy as np

MISSING = 0xFFFF
"""What stands for a number that there is none of."""

LARGEST = 32767
LEVELS, FINE = 20, 1000
"""Steps that make the numbers' root mean square: at least so that what is usual has two digits, at most four."""
ROOM = 20_000_000
"""Steps of all numbers together, where these are neither very few nor very many."""


def levels(count: int) -> int:
    """In how many steps so many numbers may be told."""
    return int(np.clip(ROOM // max(1, count), LEVELS, FINE))


def step_for(values: np.ndarray, levels: int = LEVELS) -> float:
    """What finite `values` can be rounded to: 1, 2 or 5 times a power of ten.

    That many `levels` at least make their root mean square, so far as 16 bits hold the largest then.
    """
    known = np.abs(values[np.isfinite(values)], dtype=float)
    if not known.any():
        return 1.0
    usual = float(np.sqrt(np.mean(known**2))) / levels
    return max(_nice(usual, up=False), _nice(float(known.max()) / LARGEST, up=True))


def _nice(size: float, up: bool) -> float:
    power = 10.0 ** np.floor(np.log10(size))
    steps = [float(f"{m * power:.6g}") for m in (1, 2, 5, 10)]
    return min(s for s in steps if s >= size) if up else max(s for s in steps if s <= size * (1 + 1e-9))


def rounded(values: np.ndarray, step: float) -> np.ndarray:
    """Whole numbers of steps, uint16: 0, -1, 1, -2 ... are 0, 1, 2, 3 ..., MISSING where not finite."""
    known = np.isfinite(values)
    whole = np.rint(np.where(known, values, 0) / step).astype(np.int64)
    folded = np.where(whole < 0, -2 * whole - 1, 2 * whole)
    return np.where(known, folded, MISSING).astype(np.uint16)


def plain(array: np.ndarray) -> bytes:
    """Whole numbers as bytes: first the lowest byte of each, then the next, which packs well."""
    lowest = array.astype(array.dtype.newbyteorder("<")).reshape(-1)
    return lowest.view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()


def packed(*parts: bytes) -> str:
    """Bytes as text that a browser can unpack by itself (zlib, base64)."""
    return base64.b64encode(zlib.compress(b"".join(parts), 9)).decode()


def significant(values: np.ndarray) -> list[float | None]:
    """Numbers to four significant digits; None where not finite."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in np.ravel(values).tolist()]
