"""What a store holds, in words: the summary printed after a run, the titles and captions of figures."""

import json
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis import (
    HALF_WIDTH,
    SHARE,
    axis_of,
    by_case,
    by_head,
    by_layer,
    by_variant,
    compare_paper,
    has_nulls,
    most_repaired,
    reinforced,
    reinforcement_by_head,
    reinforcement_nulls,
    restored,
    strongest_responses,
    variance_components,
)
from selfrepair_nn.analysis.checks import require
from selfrepair_nn.confidence import RATE
from selfrepair_nn.face import public
from selfrepair_nn.patching import false_negatives
from selfrepair_nn.quantities import SWEEP
from selfrepair_nn.table import COLUMNS, PARTS, Summary, columns, numbers, of_layer, of_responses
from selfrepair_nn.wording import (
    WIDTH,
    basis,
    each_heads,
    intervals,
    labels,
    legible,
    noise,
    number,
    reach,
    repaired,
    selection,
    shortness,
    span,
    task,
    title,
    warnings,
    worst_closure,
)

LABEL, RANKED, ROWS = 14, 4, 36
QUANTITY_NAMES = {
    "direct_effect": "direct effect",
    "ablated_direct_effect": "ablated DE",
    "logit_change": "logit change",
    "self_repair": "self-repair",
    "from_heads": "from heads",
    "from_mlps": "from MLPs",
    "from_norm": "from norm",
    "norm_share": "norm share",
}


@dataclass(frozen=True)
class Said:
    """A summary: the dataset that it is read from, what stands above and below its table, and the table twice.

    `rows` is the table as lines of text; `records` its numbers, one dict for each row.
    """

    found: xr.Dataset
    above: list[str]
    rows: list[str]
    below: list[str]
    index: str
    records: list[dict[str, Any]]

    @property
    def lines(self) -> list[str]:
        return [*self.above, *self.rows, *self.below]


@public
def summary(ds: xr.Dataset, share: float | None = None) -> Summary:
    """What a user sees after a run: a pandas frame that prints as plain text; `ds` is a store or its summary.

    One row per layer with something done, means over its heads on their top share in logits (Equation 2), with the
    95% interval of the self-repair, and how many heads are repaired. Of a store of cases one row per case; of one of
    several variants one row per variant, means over all heads; of one of reinforced heads those that respond to their
    own write, and of nulls of it how many do. Printed (`str`), it is a text of at most 100 columns, which also names
    the most repaired heads, the noise floor and the worst closure; a notebook shows all of this as a table.
    Errors as in `by_head`.
    """
    if not (reinforced(ds) or has_nulls(ds)):
        require(ds, ("self_repair",))
    ds = legible(restored(ds))
    if reinforced(ds):
        said = _of_reinforced(ds)
    elif has_nulls(ds):
        said = _of_nulls(ds)
    elif "case" in ds.dims or not {*ds.self_repair.dims} <= {*SWEEP}:
        said = _of_others(ds, share)
    else:
        said = _of_heads(ds, share)
    loud = [line for told in warnings(said.found) for line in textwrap.wrap(told, WIDTH)]
    lines = [*loud, "", *said.lines, "", *loud] if loud else said.lines
    notes = [*loud, *said.above], [*said.below, *loud]
    return Summary.of(said.records, said.index, "\n".join(lines), *notes)


def _nothing(found: xr.Dataset, above: list[str], told: str = "nothing is done yet") -> Said:
    """A summary without a row, and why."""
    return Said(found, above, [told], [], "row", [])


def _of_heads(ds: xr.Dataset, share: float | None) -> Said:
    heads = by_head(ds, share)
    share = heads.attrs["share"]
    layers = by_layer(heads, share)
    layers = layers.isel(layer=np.flatnonzero(layers.heads.values))
    means = f"Means over heads on {each_heads(heads)}, in logits:"
    if not layers.sizes["layer"]:
        return _nothing(heads, [*_opening(heads), ""])
    opening = [*_opening(heads), "", *textwrap.wrap(means, WIDTH)]
    each = [layers.isel(layer=i) for i in range(layers.sizes["layer"])]
    rows = [f"layer heads{_header(layers)}", *map(_row, each)]
    below = (
        ["~ mean self-repair under the noise floor of its layer", ""] if layers.under_noise.any() else [""]
    )
    best = most_repaired(heads, RANKED, share)
    alone = ", in this text alone" if shortness(heads) else ""
    closing = [f"most repaired{alone}: {_ranking(best)}", *_closing(heads), *_partners(ds, share)]
    below += [*closing, *textwrap.wrap(_how_well_known(heads), WIDTH)]
    return Said(heads, opening, rows, below, "layer", [of_layer(one) for one in each])


def _opening(found: xr.Dataset, top: bool = True) -> list[str]:
    """Whose numbers these are and what they are over; and whether the model does the task, if it is one."""
    short = shortness(found, "top_self_repair" if top else "slope")
    lines = [f"{title(found)}: {basis(found, top)}", *selection(found), *task(found), *short]
    return [part for line in lines for part in textwrap.wrap(line, WIDTH)]


def _closing(found: xr.Dataset) -> list[str]:
    """How many are repaired, what the intervals are, the noise floor and the worst closure."""
    told = [repaired(found), intervals(found), f"{noise(found)}, worst |closure| {worst_closure(found)}"]
    return [line for each in told for line in textwrap.wrap(each, WIDTH)]


def _partners(ds: xr.Dataset, share: float | None) -> list[str]:
    """Of a store of several partners, how much of a token's self-repair is theirs; otherwise nothing."""
    if "partners_averaged" not in ds.attrs or "position" not in ds.dims:
        return []
    found = variance_components(ds, share)
    name = "partner_share" if found.partner_share.notnull().any() else "top_partner_share"
    shares = {part: found[name.replace("partner", part)].where(found.tokens > 0) for part in ("document", "token")}
    own = found[name].where(found.tokens > 0)
    if not own.notnull().any():
        return []
    shares[found.attrs["clustered_by"]] = shares.pop("document")
    each = ", ".join(f"{float(values.mean()):.0%} the {part}'s" for part, values in shares.items())
    over = found[name].attrs["long_name"].rpartition(", ")[2]
    told = (
        f"of the variance of a token's self-repair, {over}, {float(own.mean()):.0%} is its partner's "
        f"(single heads {float(own.min()):.0%} to {float(own.max()):.0%}), {each} (mean over heads)"
    )
    return textwrap.wrap(told, WIDTH)


def _how_well_known(heads: xr.Dataset) -> str:
    """Of a run until its intervals are narrow: how many of them are, and what that took; otherwise nothing."""
    if "half_width" not in heads:
        return ""
    goal, what = json.loads(heads.attrs["settings"])["until_ci"]
    widths = (
        heads.half_width.values[heads.selected.values] if what == "heads" else heads.layer_half_width.values
    )
    used = heads.prompts_used.values[heads.selected.values]
    return (
        f"the 95% intervals of the {what}' means: {(widths <= goal).sum()} of {len(widths)} within ±{goal:g} logits, "
        f"with {span(heads.prompts_used)} of {heads.attrs['prompts']} prompts (mean {used.mean():.0f})"
    )


def _of_reinforced(ds: xr.Dataset) -> Said:
    """The heads that are self-repressing and self-reinforcing, the strongest first, at most ten of each."""
    found = reinforcement_by_head(ds)
    opening = _opening(found, top=False)
    if not (found.tokens > 0).any():
        return _nothing(found, opening)
    scales = ", ".join(f"{scale:g}" for scale in found["scale"].values)
    told = f"Slope of the change of direct effect on the direct effect, at scales {scales}, and its interval:"
    lines = [line for kind, count in RESPONSES.items() for line in _responses(found, kind, count)]
    records = [each for kind, count in RESPONSES.items() for each in of_responses(found, kind, count)]
    below = ["", *textwrap.wrap(intervals(found, "slope"), WIDTH), noise(found)]
    return Said(found, [*opening, "", told], lines, below, "head", records)


RESPONSES = {"self-repressing": 10, "self-reinforcing": -10}
"""Of each kind, how many of the strongest are shown; signs as in `strongest_responses`."""


def _of_nulls(ds: xr.Dataset) -> Said:
    """How many heads answer to their own write, and of how many that exceeds each null."""
    found = reinforcement_nulls(ds)
    opening = _opening(found, top=False)
    known = int(np.isfinite(found.high).any("write").sum())
    if not known:
        few = f"too few {found.attrs['clustered_by']}s for an interval"
        return _nothing(found, opening, few if (found.tokens > 0).any() else "nothing is done yet")
    told = "Heads whose slope, of the change of direct effect on the direct effect, surely differs from 0 by their own "
    told += "write; and of these, those whose slope is surely beyond that under each null:"
    nulls, records = [str(label) for label in found["null"].values], []
    lines = [f"{'':18}{'own':>10}" + "".join(f"{label:>12}" for label in (*nulls, "all nulls"))]
    for word, sign in (("self-repressing", -1), ("self-reinforcing", 1)):
        own = found.kind.values == sign
        away = (sign * found.excess_low > 0) & (sign * found.excess_high > 0)
        counts = [int((away.sel(null=label).values & own).sum()) for label in nulls]
        counts.append(int((found.beyond.values == sign).sum()))
        lines.append(f"{word:18}{own.sum():>4} of {known:<3}" + "".join(f"{count:12}" for count in counts))
        beyond = {f"beyond_{null}": count for null, count in zip((*nulls, "all_nulls"), counts, strict=True)}
        records.append({"kind": word, "heads": int(own.sum()), "tested": known, **beyond})
    above = [*opening, "", *textwrap.wrap(told, WIDTH), ""]
    below = ["", *textwrap.wrap(intervals(found, "slope"), WIDTH), noise(found)]
    return Said(found, above, lines, below, "kind", records)


def _responses(found: xr.Dataset, kind: str, count: int) -> list[str]:
    """How many heads are of a kind, and the strongest of them."""
    known = int(((found.tokens > 0) & np.isfinite(found.high).any("scale")).sum())
    if not known:
        return [f"{kind}: too few {found.attrs['clustered_by']}s for an interval"]
    best = strongest_responses(found, count)
    lines = [f"{kind}: {int((found.kind == -np.sign(count)).sum())} of {known} heads"]
    for i, label in enumerate(labels(best)):
        one = best.isel(rank=i)
        pairs = zip(one.slope.values, (one.high - one.slope).values, strict=True)
        lines.append(f"  {label:<8}" + "".join(f"{slope:+9.3f} {reach(width):<7}" for slope, width in pairs))
    return lines


def _of_others(ds: xr.Dataset, share: float | None) -> Said:
    """The summary of a store of cases, or of variants."""
    cases = "case" in ds.dims
    single = cases and {*ds.self_repair.dims} <= {"case", *SWEEP}
    along = "case" if single else axis_of(ds)
    found = by_case(ds, share) if single else by_variant(ds, share, by_case if cases else by_head)
    opening = _opening(found)
    if not (found.tokens > 0).any():
        return _nothing(found, opening)
    what = "Means" if single else f"Means over all {'cases' if cases else 'heads'}"
    names = [str(label) for label in found[along].values]
    width = min(max(map(len, [along, *names])), LABEL)
    table, shown = [along.ljust(width) + _header(found)], _largest(found, along)
    each = [_of_one(found.isel({along: i}), single) for i in range(len(names))]
    for i in shown:
        label, cells = names[i], _cells(*each[i][:2], _said(each[i][2]))
        table += [label.ljust(width) + cells] if len(label) <= width else [label, " " * width + cells]
    if len(shown) < len(names):
        table.append(f"these are of largest self-repair, of {len(names)}; selfrepair report shows all")
    means = f"{what} on {each_heads(found, 'the')}, in logits:"
    closing = _closing(found) if single else _closing_of_variants(found)
    records = [
        {along: label} | numbers(one, half_width) | counts
        for label, (one, half_width, counts) in zip(found[along].values.tolist(), each, strict=True)
    ]
    return Said(found, [*opening, "", means], table, ["", *closing], along, records)


def _largest(found: xr.Dataset, along: str) -> list[int]:
    """The rows of a table for which a screen has room: where they are many those of largest self-repair, in order."""
    repair = abs(found.top_self_repair)
    repair = repair.mean([d for d in repair.dims if d != along]).fillna(-1).values
    return sorted(np.argsort(-repair, kind="stable")[:ROWS].tolist())


def _of_one(one: xr.Dataset, case: bool) -> tuple[xr.Dataset, float, dict[str, Any]]:
    """A case's or a variant's row: its means, the half-width of its self-repair, and what of it is repaired."""
    if case:
        whether = {name: bool(one[f"top_{name}"]) for name in ("repaired", "broken")}
        return one, float(one.top_self_repair_half_width), whether
    width, tested = float(one.overall_top_self_repair_half_width), int(one.top_p_value.notnull().sum())
    counts = {name: int(one[f"top_{name}"].sum()) for name in ("repaired", "broken")}
    return one[[*columns(one).values()]].mean(), width, counts | {"tested": tested}


def _said(counts: dict[str, Any]) -> str:
    """The last cell of a row."""
    if "tested" in counts:
        return _count(counts["repaired"], counts["tested"])
    return "yes" if counts["repaired"] else "broken" if counts["broken"] else "-"


def _closing_of_variants(found: xr.Dataset) -> list[str]:
    """As `_closing`; the rows say how many are repaired."""
    site = "cases" if "case" in found.dims else "heads"
    told = [intervals(found), f"repaired: false discovery rate {RATE:.0%} over the {site} of each row"]
    told.append(f"{noise(found)}, worst |closure| {worst_closure(found)}")
    return [line for each in told for line in textwrap.wrap(each, WIDTH)]


def _correlation(found: xr.Dataset, name: str) -> str:
    return f"{found.attrs[name]:.2f} {reach(found.attrs[name + HALF_WIDTH])}".strip()


def missed(found: xr.Dataset) -> str:
    """What `attribution` gives, in words: how it goes with the exact effects, and the heads that it misses.

    Raises UsageError as `false_negatives`.
    """
    heads = false_negatives(found)
    tested = int(np.isfinite(found.logit_change_half_width).sum())
    count = found.logit_change.count().item()
    lines = [f"{title(found)}: attribution patching beside the exact effect of {count} heads"]
    ranks, linear = (_correlation(found, f"{kind}_correlation") for kind in ("rank", "linear"))
    lines.append(
        f"over heads, of the mean changes: rank correlation {ranks}, linear {linear}; over prompts, of one "
        f"head: {float(found.correlation.median()):.2f} (median)"
    )
    if not tested:
        return "\n".join([*lines, f"{intervals(found, 'attributed_change')}: no head is called missed"])
    of, cut, small = int(found.matters.sum()), int(found.cancelled.sum()), found.attrs["small"]
    lines.append(
        f"something is surely removed in {of} heads; of these the exact change is surely below {small:g} "
        f"of it in {cut}, the attributed one in {heads.sizes['rank']}"
    )
    lines = [part for line in lines for part in textwrap.wrap(line, WIDTH)]
    if heads.sizes["rank"]:
        lines += ["", *_missed_rows(heads)]
    return "\n".join([*lines, "", *textwrap.wrap(intervals(found, "attributed_change"), WIDTH)])


def _missed_rows(heads: xr.Dataset) -> list[str]:
    names = {"removed": "removed", "logit_change": "exact change", "attributed_change": "attributed"}
    names |= {name: of for of, name in zip((*COLUMNS, *PARTS), (*COLUMNS.values(), *PARTS.values()), strict=True)}
    shown = {name.removeprefix("top_"): of.strip("=+ ") for name, of in names.items()}
    shown = {name: of for name, of in shown.items() if name in heads and name not in ("direct_effect", "self_repair")}
    shown["logit_change"] = "exact change"
    width = min(16, (WIDTH - 6) // len(shown))
    lines = ["head  " + "".join(f"{of:>{width}}" for of in shown.values())]
    for rank, label in enumerate(labels(heads)):
        one = heads.isel(rank=rank)
        cells = (number(float(one[n])) + reach(float(one[n + HALF_WIDTH])) for n in shown)
        lines.append(f"{label:<6}" + "".join(f"{cell:>{width}}" for cell in cells))
    return lines


def comparison(ds: xr.Dataset, reference: str | None = None) -> str:
    """A store's per-layer means beside the paper's, as plain text of at most 100 columns; arguments as `compare_paper`.

    The last lines of each table are the mean over layers of the absolute difference, and of how many layers the
    published mean lies outside the store's interval. Errors as in `compare_paper`.
    """
    ds = legible(ds)
    heads = by_head(ds, SHARE)
    found = compare_paper(heads, reference)
    found = found.isel(layer=np.flatnonzero(found.direct_effect.sel(source="store").notnull()))
    name, same = found.attrs["reference"], found.attrs["n_layers"] == found.attrs["reference_n_layers"]
    opening = [f"{title(heads)}, beside {name} as the paper's authors published it", basis(heads)]
    opening += [found.attrs["top_tokens"], f"{intervals(heads)}; none were published"]
    opening += [found.attrs["differs"]] if "differs" in found.attrs else []
    if not same:
        sizes = f"{found.attrs['n_layers']} layers here, {found.attrs['reference_n_layers']} there"
        opening.append(f"{sizes}: each stands beside the layer of {name} at the same depth.")
    opening.append("Means over heads on each head's top 2% of tokens by direct effect, in logits:")
    if not found.sizes["layer"]:
        return "\n".join([*opening[:-1], "nothing is done yet"])
    lines = [line for each in opening for line in textwrap.wrap(each, WIDTH)]
    names = list(QUANTITY_NAMES)
    for shown in (names[:4], names[4:]):
        lines += ["", *_beside(found, shown, same)]
    loud = [line for told in warnings(heads) for line in textwrap.wrap(told, WIDTH)]
    return "\n".join([*loud, *lines, *loud])


def _header(found: xr.Dataset) -> str:
    effect, change, repair, *parts = columns(found)
    return f"{effect:>14}{change:>13}{repair:>12}{'':>9}{_parts(parts)}{'repaired':>11}"


def _parts(cells: list[str]) -> str:
    """The last columns, closer together where there are more of them."""
    width = 9 if len(cells) < 4 else 7
    return "".join(f"{each:>{width}}" for each in cells)


def _cells(one: xr.Dataset, half_width: float, repaired: str, mark: str = " ") -> str:
    """A row's numbers; `mark` is set behind the self-repair."""
    effect, change, repair, *parts = (number(float(one[name])) for name in columns(one).values())
    shown = f"{effect:>14}{change:>13}{repair:>11} {reach(half_width):<8}{mark}"
    return f"{shown}{_parts(parts)}{repaired:>11}"


def _count(repaired: int, tested: int) -> str:
    return f"{repaired} of {tested}" if tested else "-"


def _row(layer: xr.Dataset) -> str:
    tested = int(layer.top_tested)
    repaired = _count(round(float(layer.top_repaired) * tested) if tested else 0, tested)
    mark = "~" if layer.under_noise else " "
    cells = _cells(layer, float(layer.top_self_repair_half_width), repaired, mark)
    return f"{int(layer.layer):5}{int(layer.heads):6}{cells}"


def _beside(found: xr.Dataset, shown: list[str], same: bool) -> list[str]:
    """A table of the store's and the paper's columns of some quantities, the store's with half an interval."""
    lines = ["layer".ljust(12) + "".join(f"{QUANTITY_NAMES[name]:>22}" for name in shown)]
    lines.append(" " * 12 + f"{'here':>14}{'paper':>8}" * len(shown))
    for layer in range(found.sizes["layer"]):
        one = found.isel(layer=layer)
        label = f"{int(one.layer):5}" + ("" if same else f" / {int(one.reference_layer)}")
        cells = (
            f"{number(float(one[n][0])) + reach(float(one[n + HALF_WIDTH])):>14}{number(float(one[n][1])):>8}"
            for n in shown
        )
        lines.append(label.ljust(12) + "".join(cells))
    apart = (float(abs(found[name].diff("source")).mean()) for name in shown)
    lines.append("apart".ljust(12) + "".join(f"{value:22.3f}" for value in apart))
    known = [int(np.isfinite(found[name + HALF_WIDTH]).sum()) for name in shown]
    outside = (int(found[f"{name}_outside"].sum()) for name in shown)
    told = (f"{out} of {of}" if of else "-" for out, of in zip(outside, known, strict=True))
    return [*lines, "outside ±".ljust(12) + "".join(f"{each:>22}" for each in told)]


def _ranking(best: xr.Dataset) -> str:
    values = zip(
        labels(best), best.top_self_repair.values, best.top_self_repair_half_width.values, strict=True
    )
    return "  ".join(f"{label} {number(value)}{reach(width)}" for label, value, width in values)
