"""Which of a head's tokens a statistic is over, said once, on the dataset: which tail, and where it is selected."""

import json

import numpy as np
import xarray as xr

from selfrepair_nn.face import public
from selfrepair_nn.values import one_of

TAILS = {
    "top": "the tokens of highest direct effect",
    "bottom": "those of lowest: where a head writes against the target",
    "absolute": "those of largest direct effect of either sign, counted along its sign",
}
"""What a share of a head's tokens can be of."""
DOCUMENTS = 10
"""Of fewer documents the halves would be too unlike: then they are of prompts."""
AGAINST = {
    "removed": "what the ablation takes away, DE \N{MINUS SIGN} DE'",
    "direct-effect": "what the head writes, DE, as in the paper",
}
"""What the change of the logit can be set against."""
WRITES_NOTHING = ("zero", "identity")
"""Replacements of which what is removed says no more than the direct effect: all of it, or nothing."""


def against_of(ds: xr.Dataset) -> str:
    """What the changes of a dataset's logits are set against, chosen or by its replacement."""
    usual = "direct-effect" if str(ds.attrs.get("ablation")) in WRITES_NOTHING else "removed"
    return str(ds.attrs.get("against", usual))


@public
def choose_tokens(ds: xr.Dataset, *, tail: str | None = None, split_selection: bool | None = None) -> xr.Dataset:
    """The same store, of which every statistic, summary and figure is over another choice of each head's tokens.

    Numbers over a share of tokens keep their names (top_x): the attribute `tail` says which share it is.

    Args:
        tail: "top", the tokens of highest direct effect, as in the paper; "bottom", those of lowest, where a head
            writes against the target; "absolute", those of largest size, of either sign. Tokens of either sign would
            cancel in a mean, so there each counts along the sign of its direct effect (times -1 where that is below
            0): top_direct_effect is the mean size, and top_self_repair above 0 is repair.
        split_selection: whether tokens (their threshold), the strongest heads and the most frequent neurons are
            selected on one half of the documents, and everything is reported on the other half. Halves are drawn,
            always alike; of prompts where there are fewer than 10 documents.

    None leaves a choice as it is.

    Raises:
        UsageError: no such tail.
    """
    chosen = {}
    if tail is not None:
        one_of("tail", tail, TAILS)
        chosen["tail"] = tail
    if split_selection is not None:
        chosen["half"] = "reporting" if split_selection else "whole"
    return ds.assign_attrs(chosen)


def viewed(
    ds: xr.Dataset, tail: str | None, split_selection: bool | None, against: str | None
) -> xr.Dataset:
    """The same store, as figures and pages are to show it: `choose_tokens`, and what logit changes are set against."""
    if against is not None:
        ds = ds.assign_attrs(against=one_of("against", against, AGAINST))
    return choose_tokens(ds, tail=tail, split_selection=split_selection)


def tail_of(ds: xr.Dataset) -> str:
    """The tail that a dataset's shares are of."""
    return str(ds.attrs.get("tail", "top"))


def splits(ds: xr.Dataset) -> bool:
    """Whether what is reported of a dataset is selected on other prompts."""
    return half_of(ds) == "reporting"


def halves(ds: xr.Dataset) -> dict[str, xr.Dataset]:
    """The half of a dataset on which tokens and heads are selected, and the other: as reported, and as if alone."""
    return {half: ds.assign_attrs(half=half) for half in ("selecting", "reporting", "alone")}


def in_half(ds: xr.Dataset) -> np.ndarray:
    """Which prompts what is said of a dataset is over: bool [prompt]."""
    n, half = ds.sizes["prompt"], half_of(ds)
    if half == "whole":
        return np.ones(n, bool)
    if "selecting_prompts" in ds.attrs:  # heads were found on these, whatever is left of the run
        selecting = np.isin(ds.prompt.values, json.loads(str(ds.attrs["selecting_prompts"])))
    else:
        document = ds.document.values if "document" in ds.variables else np.zeros(n, int)
        selecting = selecting_half(document)
    return selecting == (half == "selecting")


def half_of(ds: xr.Dataset) -> str:
    """The half that a dataset is of; if its heads were found on one, and nothing is chosen, that is the other."""
    usual = "reporting" if ds.attrs.get("found_on") == "half" else "whole"
    return str(ds.attrs.get("half", usual))


def selecting_half(document: np.ndarray) -> np.ndarray:
    """Which prompts select, and do not report: bool [prompt]; the same for the same documents [prompt]."""
    names, unit = np.unique(document, return_inverse=True)
    if names.size < DOCUMENTS:
        unit = np.arange(len(document))
    drawn = np.random.default_rng(0).permutation(int(unit.max()) + 1)
    return np.isin(unit, drawn[: len(drawn) // 2])


def ranked_by(effects: np.ndarray, tail: str) -> np.ndarray:
    """What tokens of these direct effects are ranked by, the highest first."""
    if tail == "top":
        return effects
    return -effects if tail == "bottom" else abs(effects)


def along(effects: np.ndarray, tail: str) -> np.ndarray:
    """The sign with which tokens of these direct effects count."""
    return np.where(effects < 0, -1.0, 1.0) if tail == "absolute" else np.ones_like(effects)
