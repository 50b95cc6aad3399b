"""A summary as a table of numbers: a pandas frame that prints as its text, and shows well in a notebook."""

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from selfrepair_nn.analysis import strongest_responses
from selfrepair_nn.wording import labels

COLUMNS = {
    "direct effect": "top_direct_effect",
    "logit change": "top_logit_change",
    "self-repair": "top_self_repair",
    "= heads": "top_from_heads",
    "+ MLPs": "top_from_mlps",
    "+ norm": "top_from_norm",
}
PARTS = {
    "= others": "top_from_components",
    "+ mixers": "top_from_mixers",
    "+ post": "top_from_post_norms",
}
"""Further columns, before the norm's, of what some stores have."""


class Summary(pd.DataFrame):
    """A pandas frame with a row for each layer, case, variant or head; what is cut from it is an ordinary frame.

    `str` and `repr` give the text of a terminal. `attrs["above"]` and `attrs["below"]` are what it says of the table:
    what the means are over, how they are known, the noise floor.
    """

    @classmethod
    def of(
        cls, rows: list[dict[str, Any]], index: str, text: str, above: Iterable[str], below: Iterable[str]
    ) -> "Summary":
        """From its rows, one dict each, and the column that names them."""
        found = cls(rows, columns=None if rows else pd.Index([index]))
        found = cls(found.set_index(index))
        found.attrs = {"text": text, "above": _said(above), "below": _said(below)}
        return found

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __repr__(self) -> str:
        return self.attrs.get("text", super().__repr__())

    __str__ = __repr__

    def _repr_html_(self) -> str:
        above, below = (_html(self.attrs.get(name, ())) for name in ("above", "below"))
        table = (
            self.to_html(float_format="{:+.3f}".format, na_rep="-")
            if len(self)
            else "<p>nothing is done yet</p>"
        )
        return f"{above}{table}{below}"

    def records(self) -> list[dict[str, Any]]:
        """Its rows as plain dicts; None where there is no number."""
        rows = self.reset_index().astype(object).to_dict("records")
        return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in rows]


def columns(found: xr.Dataset) -> dict[str, str]:
    """Those of the COLUMNS and PARTS that a summary has."""
    *first, last = COLUMNS.items()
    return {name: of for name, of in (*first, *PARTS.items(), last) if of in found}


def numbers(one: xr.Dataset, half_width: float) -> dict[str, float | None]:
    """A row's means by the quantities' own names, the self-repair with the ends of its interval."""
    found = {}
    for name in columns(one).values():
        found[name.removeprefix("top_")] = value = float(one[name])
        if name == "top_self_repair":
            found |= {"self_repair_low": value - half_width, "self_repair_high": value + half_width}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def of_layer(layer: xr.Dataset) -> dict[str, Any]:
    """A layer's row: how many of its heads are in it, the means, how many of those tested are repaired and broken."""
    tested = int(layer.top_tested)
    counts = {
        name: round(float(layer[f"top_{name}"]) * tested) if tested else None
        for name in ("repaired", "broken")
    }
    means = numbers(layer, float(layer.top_self_repair_half_width))
    named = {"layer": int(layer["layer"]), "heads": int(layer.heads)}
    return named | means | counts | {"tested": tested, "under_noise": bool(layer.under_noise)}


def of_grid(found: xr.Dataset, *dims: str) -> list[dict[str, Any]]:
    """What a summary has of each place along these dimensions, as plain dicts."""
    named = [str(name) for name, each in found.data_vars.items() if {*each.dims} <= {*dims} and each.ndim]
    rows = found[named].reset_coords(drop=True).to_dataframe().reset_index().to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def of_responses(found: xr.Dataset, kind: str, count: int) -> list[dict[str, Any]]:
    """Rows of the heads that answer most to their own write: the slope at each scale, and the ends of its interval.

    `found` and `count` as in `analysis.strongest_responses`; none where nothing has an interval.
    """
    if not np.isfinite(found.high).any():
        return []
    best, rows = strongest_responses(found, count), []
    for i, label in enumerate(labels(best)):
        rows.append({"head": label, "kind": kind})
        for scale in best["scale"].values:
            one = best.isel(rank=i).sel(scale=scale)
            ends = (("slope", ""), ("low", "_low"), ("high", "_high"))
            rows[-1] |= {f"slope_{scale:g}{end}": float(one[name]) for name, end in ends}
    return rows


def _said(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if line]


def _html(lines: Iterable[str]) -> str:
    return f"<p>{'<br>'.join(map(escape, lines))}</p>"
