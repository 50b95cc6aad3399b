"""What is said of a dataset in a few words: its title, what its means are over, how well they are known."""

from pathlib import Path

import numpy as np
import xarray as xr

from selfrepair_nn.analysis import HALF_WIDTH, among, percent
from selfrepair_nn.analysis.extent import known_means, needed, too_short
from selfrepair_nn.choosing import splits, tail_of
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import CLUSTERS, RATE
from selfrepair_nn.quantities import asked_in
from selfrepair_nn.shown import line

WIDTH = 100
"""Columns of what is printed."""

LARGE = 1e4


def legible(ds: xr.Dataset) -> xr.Dataset:
    """The same numbers, with every attribute and label of an axis fit to be printed or drawn: others may have made it.

    Attributes are cut to a line's width, those in JSON excepted. The texts of single tokens are left as they are. A
    dataset that is fit already is returned as it is.
    """
    attributes = {
        name: _legible(value) if isinstance(value, str) else value for name, value in ds.attrs.items()
    }
    labels = {name: c for name, c in ds.coords.items() if c.dtype.kind in "OTU" and c.ndim < 2}
    filtered = {
        n: (c.dims, np.vectorize(line, [object])(c.values), c.attrs) for n, c in labels.items() if c.size
    }
    if attributes == ds.attrs and all((ds[n].values == each[1]).all() for n, each in filtered.items()):
        return ds
    return ds.assign_coords(filtered).assign_attrs(attributes)


def _legible(value: str) -> str:
    return line(value, None if value.startswith(("{", "[")) else WIDTH)


def title(ds: xr.Dataset) -> str:
    """Model and ablation, as far as the store tells, and what is frozen if anything is."""
    frozen = ds.attrs.get("freeze", "none")
    parts = [model(ds), ablation(ds), *([f"frozen: {frozen}"] if frozen != "none" else [])]
    return ", ".join(parts)


def ablation(ds: xr.Dataset) -> str:
    """What was done to a site, in words."""
    done = str(ds.attrs.get("ablation", "")).split(", ")
    if done[0].startswith("reinforce"):
        scales = dict.fromkeys(each.split("_")[-1].lstrip("-") for each in done)
        nulls = ", and nulls of it" if any(not each.startswith("reinforce_") for each in done) else ""
        return f"heads reinforced by {', '.join(scales)} × their own write{nulls}"
    several = f", mean over {ds.attrs['partners_averaged']} partners" if "partners_averaged" in ds.attrs else ""
    return f"{', '.join(done)} ablation{several}" if "ablation" in ds.attrs else "ablation not recorded"


def model(ds: xr.Dataset) -> str:
    """The model's name; of a directory's path only the last part."""
    name = str(ds.attrs.get("model", "unnamed model"))
    return Path(name).name if Path(name).is_absolute() else name


def unit(heads: xr.Dataset) -> str:
    """What its numbers are in."""
    return "nats" if asked_in(heads) == "logprob" else "logits"


def effect(heads: xr.Dataset) -> str:
    """What stands against the change on a horizontal axis."""
    return "own effect on log-probability" if asked_in(heads) == "logprob" else "direct effect"


def change(heads: xr.Dataset) -> str:
    """What the whole model does."""
    return "log-probability change" if asked_in(heads) == "logprob" else "logit change"


def counted(count: int, what: str) -> str:
    """ "1 head", "2 heads"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def basis(heads: xr.Dataset, top: bool = True) -> str:
    """What the means of a summary are over: heads, tokens, top share, target; and how much is done."""
    dims = [d for d in heads.tokens.dims if d not in ("case", "layer", "head", "rank")]
    number = int((heads.tokens > 0).any(dims).sum())
    site = "case" if "case" in heads.dims else "head"
    some = heads.attrs.get("counted_share", 1) < 1
    parts = [counted(number, site), f"{span(heads.tokens)} tokens each"]
    if some:
        parts[-1] += f" that count ({percent(heads.attrs['counted_share'])} of all)"
    if top and not (some and heads.attrs["share"] == 1):
        parts.append(f"{span(heads.top_tokens)} in the {among(heads.attrs['share'], heads).removesuffix(' of tokens')}")
    parts.append(f"{heads.attrs.get('target', 'unknown')} target")
    return ", ".join(parts + unfinished(heads))


def selection(heads: xr.Dataset) -> list[str]:
    """Of a summary that is selected on one half and reported on the other, one line: what that changes; else none."""
    if not splits(heads) or "prompts_reporting" not in heads.attrs:
        return []
    own, others = heads.attrs["prompts_selecting"], heads.attrs["prompts_reporting"]
    told = f"selected on {own} prompts, reported on {others} others"
    if heads.attrs["share"] == 1 or "bias_self_repair" not in heads:
        return [told]
    added = ", ".join(f"{_with_reach(heads, f'bias_{name}')} {what}" for name, what in BIASES.items())
    return [f"{told}; tokens selected on the reported half itself would add {added} (logits, mean over heads)"]


BIASES = {"direct_effect": "to the direct effect", "self_repair": "to the self-repair"}


def _with_reach(heads: xr.Dataset, name: str) -> str:
    """The mean over all heads of a mean, with its interval; of several variants the least and the largest of them."""
    width = heads[f"overall_{name}{HALF_WIDTH}"]
    if width.ndim:
        means = heads[name].mean([d for d in heads[name].dims if d not in width.dims]).values
        ends = means.argmin(), means.argmax()
        return " to ".join(f"{number(float(means[i]))} {reach(float(width[i]))}".strip() for i in ends)
    width = float(width)
    return f"{number(float(heads[name].mean()))} {reach(width)}".strip()


def each_heads(heads: xr.Dataset, whose: str = "each head's") -> str:
    """The tokens that means of a summary are over, in words."""
    share = heads.attrs["share"]
    if share == 1:
        return f"the {among(share, heads)}"
    said = {
        "top": "top {} of tokens by direct effect",
        "bottom": "bottom {} of tokens by direct effect",
        "absolute": "{} of tokens of largest direct effect of either sign, counted along its sign",
    }
    return f"{whose} {said[tail_of(heads)].format(percent(share))}"


def shortness(heads: xr.Dataset, name: str = "top_self_repair") -> list[str]:
    """One line where there is too little text to say anything, and how much it takes; else none."""
    return [told] if (told := too_short(heads, name)) else []


def task(heads: xr.Dataset) -> list[str]:
    """Whether the model does the task of its prompts, one line; none where they are no task."""
    return [heads.attrs["task"]] if "task" in heads.attrs else []


def intervals(heads: xr.Dataset, name: str = "top_self_repair") -> str:
    """What the 95% intervals of a summary take as independent, and where there are too few of these for any."""
    kind, count = heads.attrs.get("clustered_by", "prompt"), heads.attrs.get("clusters", 0)
    few = f"too few {kind}s for an interval"
    wide, of = known_means(heads, name)
    if wide == of:
        told = f"{CLUSTERS} must hold a token of the mean, and there are {count} in all"
        return f"{few}: {told}; it takes {needed(heads, name)}"
    documents = heads.attrs.get("documents", 0)
    reason = f"; documents are few: {documents}" if kind == "prompt" and 0 < documents < CLUSTERS else ""
    told = f"95% intervals, clustered by {kind} ({count:,}{reason})"
    return told if not wide else f"{told}; {few} of {wide} of {of} means"


def repaired(heads: xr.Dataset, prefix: str = "top_") -> str:
    """How many heads are repaired, by the rule of `by_head`, and how many broken; or that this cannot be said."""
    tested = int(heads[f"{prefix}p_value"].notnull().sum())
    site = "cases" if "case" in heads.dims else "heads"
    if not tested:
        return f"repaired: too few {heads.attrs.get('clustered_by', 'prompt')}s for an interval"
    counts = {name: int(heads[prefix + name].sum()) for name in ("repaired", "broken")}
    neither = tested - sum(counts.values())
    return (
        f"repaired: {counts['repaired']} of {tested} {site}, broken: {counts['broken']}, neither for sure: {neither} "
        f"(false discovery rate {RATE:.0%})"
    )


def warnings(heads: xr.Dataset) -> list[str]:
    """What must be known before any number of a summary is used: nothing, of a sound run."""
    worst, limit = heads.attrs.get("worst_closure", 0), heads.attrs.get("closure_limit", np.inf)
    if worst <= limit:
        return []
    return [
        f"WARNING: do not use these numbers. The parts of the self-repair miss the whole by up to {worst:.2g} logits, "
        f"and {heads.attrs.get('dtype', 'this number format')} allows {limit:.1g}: the model was not decomposed as it "
        "computes. Run `selfrepair check` on it."
    ]


def unfinished(heads: xr.Dataset) -> list[str]:
    done = heads.attrs.get("done_share", 1)
    enough = "half_width" in heads and "finished" in heads.attrs
    return [] if done == 1 or enough else [f"{percent(min(done, 0.999))} of the run done"]


def noise(heads: xr.Dataset) -> str:
    """The noise floor of the layers, from the smallest to the largest."""
    floors = heads.noise_floor.values[np.isfinite(heads.noise_floor.values)]
    if not floors.size:
        return "noise floor not measured"
    low, high = f"{floors.min():.1g}", f"{floors.max():.1g}"
    return f"noise floor {low if low == high else f'{low} to {high}'} logits"


def worst_closure(heads: xr.Dataset) -> str:
    if "from_components" in heads:
        return "none, as nothing is split"
    return f"{heads.attrs['worst_closure']:.1g} logits" if "worst_closure" in heads.attrs else "unknown"


def number(value: float) -> str:
    """A signed number: three decimals; its power of ten where those would show none, or it has very many digits."""
    if np.isnan(value):
        return "-"
    if LARGE <= abs(value) < np.inf:
        return f"{value:+.1e}"
    return f"{value:+.0e}" if 0 < abs(value) < 0.0005 else f"{value:+.3f}"


def reach(half_width: float) -> str:
    """ "±0.021" of a half-width; nothing where there is no interval."""
    return f"±{number(half_width).removeprefix('+')}" if np.isfinite(half_width) else ""


def labels(heads: xr.Dataset) -> list[str]:
    """ "L11H2" for every head of a result of `most_repaired`."""
    places = zip(heads["layer"].values, heads["head"].values, strict=True)
    return [Head(int(layer), int(head)).label for layer, head in places]


def span(counts: xr.DataArray) -> str:
    known = counts.values[counts.values > 0]
    if not known.size:
        return "0"
    low, high = int(known.min()), int(known.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
