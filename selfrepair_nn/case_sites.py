"""The sites of each case as data: how a store holds them, and what they are when it is read."""

import json
import re
from collections.abc import Sequence
from typing import Any, get_args

import xarray as xr

from selfrepair_nn.components import Ablatable, Attention, Head, Layers, Mlp, Neuron, Swap
from selfrepair_nn.errors import UsageError

Case = tuple[Ablatable, ...]

KINDS: dict[str, Any] = {kind.kind: kind for kind in get_args(Ablatable)} | {"swap": Swap}
"""By the word that a store has for each; older stores have one for two layers that change places."""

_LABELS = (
    (re.compile(r"L(\d+)H(\d+)"), Head),
    (re.compile(r"L(\d+)N(\d+)"), Neuron),
    (re.compile(r"L(\d+)\.attention"), Attention),
    (re.compile(r"L(\d+)\.mlp"), Mlp),
    (re.compile(r"layers (\d+):(\d+)"), Layers),
    (re.compile(r"layer (\d+)"), lambda layer: Layers(layer, layer + 1)),
    (re.compile(r"swap (\d+),\d+"), Swap),
)
"""How stores without `case_sites`, which are older, tell their cases' sites."""


def written(case: Case) -> str:
    """A case as a store holds it: [["head", 9, 6], ["head", 9, 9]], each the kind of a site and its numbers."""
    return json.dumps([site.entry for site in case])


def sites_of(ds: xr.Dataset) -> list[Case]:
    """The sites of each case of a store, a part of one or a summary; () for a case that neither says."""
    labels = ds["case"].values.ravel().tolist() if "case" in ds.coords else []
    held = ds["case_sites"].values.ravel().tolist() if "case_sites" in ds.coords else [None] * len(labels)
    return read(labels, held)


def read(labels: Sequence[Any], held: Sequence[Any]) -> list[Case]:
    """The sites that `written` has in `held`; by their labels where that is None."""
    return [
        _labelled(str(label)) if each is None else _read(each)
        for label, each in zip(labels, held, strict=True)
    ]


def _read(text: Any) -> Case:
    try:
        return tuple(KINDS[kind](*numbers) for kind, *numbers in json.loads(text))
    except (KeyError, TypeError, ValueError, RecursionError, UsageError):
        return ()


def _labelled(label: str) -> Case:
    found = []
    for part in label.split("+"):
        known = next(((k, m.groups()) for p, k in _LABELS if (m := p.fullmatch(part))), None)
        if known is None:
            return ()
        try:
            found.append(known[0](*map(int, known[1])))
        except (ValueError, UsageError):
            return ()
    return tuple(found)
