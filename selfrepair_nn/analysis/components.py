"""Of what the self-repair of a token varies: the document, the token, or the partner that replaces it."""

from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import among, restored, share_of, throughout
from selfrepair_nn.analysis.partners import BY_PARTNER
from selfrepair_nn.analysis.summaries import by_case, by_head, described_widths
from selfrepair_nn.analysis.tokens import Columns, Tokens
from selfrepair_nn.blocks import counted_tokens, of_partners, of_top_tokens
from selfrepair_nn.confidence import Estimate
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import IN_NATS, VARIANCE, asked_in

PARTS = ("document", "token", "partner")


@public
def variance_components(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head` and, of a token's self-repair, what is the document's, the token's and the partner's.

    Of a store of K partners of each prompt (`--resamples K`), for all counted tokens and, as top_x, for each head's top
    share. With y the self-repair (in nats of `in_nats`) of a token t in prompt p of document d with the partner k, the
    model is one of random effects, all independent with mean 0,

        y = mean + D(d) + T(t) + P(p, k) + E(t, k)

    P is what a partner's text does to a whole prompt, E what it does beyond that to one token; another prompt has other
    partners. The estimates are the analysis of variance's, by the method of moments for unequal numbers: sums of
    squares are set equal to their expectations (Henderson 1953, Estimation of variance and covariance components,
    method 1; Searle, Casella and McCulloch 1992, Variance Components, chapter 5). With N tokens in B prompts of a
    clusters, n of each, and dots for means,

        sum (y_tk - y_t.)^2        = N (K-1) (P + E)
        sum n_p (y_p.k - y_p..)^2  = (K-1) (N P + B E)
        sum (y_t. - y_d..)^2       = (N-a) (T + E/K) + (N - sum n_p^2/n_d) P/K
        sum n_d (y_d.. - y...)^2   = (a-1) (T + E/K) + (N - sum n_d^2/N) D + (sum n_p^2/n_d - sum n_p^2/N) P/K

    - variance_document, variance_token, variance_partner = P + E, in logits squared; variance_partner_text: P of it,
      NaN in a store of moments, which does not tell tokens' partners apart (there P counts as 0 in the others), and
      where no prompt has two tokens;
    - document_share, token_share, partner_share: of their sum, what each is. An estimate below 0, which chance makes of
      a variance near 0, stays as it is among the variances; in the shares it counts as 0;
    - x_half_width: half the width of the 95% interval, by the jackknife over clusters (documents, or prompts where
      these are few, which then stand for documents), and overall_, layer_ ones of means over heads, as in `by_head`.

    Attribute partners: K. A result of this function is returned as it is. Memory: one block of prompts of all partners.

    Raises:
        UsageError: the store has one partner of each prompt, `share` is not in (0, 1], or it has several variants.
    """
    if "partner_share" in ds or "top_partner_share" in ds:
        return by_head(ds, share)
    ds = restored(ds)
    _require_several(ds)
    share = share_of(ds, share)
    heads = (by_case if "case" in ds.dims else by_head)(ds, share)
    tokens, _ = Tokens.of(ds, share)
    every, top = _squares(ds, tokens)
    partners = int(ds.attrs["partners_averaged"])
    found = _columns(tokens, "top_", top, partners)
    if ds.attrs.get("kept_share", 1) < 1 or of_top_tokens(ds, _name(ds)):
        every = np.full(every.shape, np.nan)
    found |= _columns(tokens, "", every, partners)
    return _describe(heads.assign(found).assign_attrs(partners=partners), share)


def _require_several(ds: xr.Dataset) -> None:
    if "partners_averaged" not in ds.attrs or not ({_name(ds) + BY_PARTNER, _name(ds) + VARIANCE} & {*ds.data_vars}):
        raise UsageError(
            "this store has one partner of each prompt, which cannot be told from the token: run its recipe with "
            "--resamples 4, say"
        )


def _name(ds: xr.Dataset) -> str:
    """What is asked about, as the store calls it."""
    return IN_NATS["self_repair"] if asked_in(ds) == "logprob" else "self_repair"


def _squares(ds: xr.Dataset, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Sums by prompt from which all sums of squares follow, of all counted tokens and of the top share.

    [sum, case, prompt] each: how many tokens; the sums of their means over partners, and of the squares of these; of
    the squares of partners' deviations from them; and of the squares of the deviations that the prompt's mean has,
    times its tokens: NaN in a store of moments.
    """
    asked, shape, partners = counted_tokens(ds), (5, *tokens.done.shape), int(ds.attrs["partners_averaged"])
    every, top = np.zeros(shape), np.zeros(shape)
    signs = np.zeros((tokens.done.shape[0], tokens.done.shape[1] * ds.sizes["position"]), np.int8)
    signs[tokens.top.case, tokens.top.token] = tokens.top.sign
    signs = signs.reshape(*tokens.done.shape, -1)
    for here, values, variances in of_partners(ds, _name(ds)):
        counted = tokens.done[:, here, None] & asked[here]
        every[..., here] = _of_block(values, variances, counted, partners)
        top[..., here] = _of_block(values, variances, signs[:, here], partners)
    return every, top


def _of_block(values: np.ndarray, variances: np.ndarray | None, weight: np.ndarray, partners: int) -> np.ndarray:
    """The five sums of values [partner, case, prompt, position], or of their mean where there are `variances`.

    `weight` [case, prompt, position] is 0 where a token does not count, else the sign with which it does.
    """
    counted = weight != 0
    kept = np.where(counted, values, 0) * weight
    means, count = kept.mean(0), counted.sum(-1)
    if variances is None:
        within = np.square(kept - means).sum((0, -1))
        of_prompt = kept.sum(-1)
        shared = np.square(of_prompt - of_prompt.mean(0)).sum(0) / np.maximum(count, 1)
    else:
        within = (partners - 1) * np.where(counted, variances, 0).sum(-1)
        shared = np.full(count.shape, np.nan)
    return np.stack([count, means.sum(-1), np.square(means).sum(-1), within, shared])


def _columns(tokens: Tokens, prefix: str, squares: np.ndarray, partners: int) -> Columns:
    """Every estimate with its intervals, as columns of the summary."""
    sums = _by_cluster(squares, tokens.clusters)
    total, n = sums.sum(-1, keepdims=True), (sums[1] > 0).sum(-1, keepdims=True)
    whole, without = _estimates(total, partners), _estimates(total - sums, partners)
    found: Columns = {}
    for name, value in whole.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            moved = np.where(n > 1, (value - without[name]) * np.sqrt((n - 1) / n), np.inf)
        moved = np.where(np.isnan(moved), np.inf, moved)
        shares = sums[1] / np.maximum(total[1], 1)
        found |= tokens.columns(prefix + name, Estimate(value[:, 0], moved, shares))
    return found


def _by_cluster(squares: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """What adds up over clusters, [sum, case, cluster], of `_squares`: counts, squares of counts, sums of squares."""
    count = squares[0]
    by_prompt = np.concatenate([squares, (count > 0)[None], np.square(count)[None]])
    found = np.zeros((*by_prompt.shape[:2], int(clusters.max()) + 1))
    at: Any = (slice(None), slice(None), clusters)
    np.add.at(found, at, by_prompt)
    n, sums, squared, within, shared, prompts, of_prompts = found
    some = np.maximum(n, 1)
    means = sums**2 / some
    kept = (n > 0, n, prompts, n**2, of_prompts, of_prompts / some, within, shared, squared - means, means, sums)
    return np.stack(kept).astype(float)


def _estimates(sums: np.ndarray, partners: int) -> dict[str, np.ndarray]:
    """The estimates from sums over clusters [sum, case, …], as `variance_components` has them; NaN where unknown."""
    a, n, prompts, of_clusters, of_prompts, inside, within, shared, between, means, total = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        partner = within / (n * (partners - 1))
        told = np.isfinite(shared) & (n > prompts)
        alone = np.where(told, (within - shared) / ((partners - 1) * (n - prompts)), partner)
        text = partner - alone
        own = (between - (n - inside) * text / partners) / (n - a)
        among_clusters = means - total**2 / n
        document = among_clusters - (a - 1) * own - (inside - of_prompts / n) * text / partners
        document = document / (n - of_clusters / n)
        found = {"document": document, "token": own - alone / partners, "partner": partner}
        found = {name: np.where(np.isfinite(value), value, np.nan) for name, value in found.items()}
        size = sum(np.maximum(value, 0) for value in found.values())
        shares = {f"{name}_share": np.maximum(value, 0) / size for name, value in found.items()}
    variances = {f"variance_{name}": value for name, value in found.items()}
    return variances | {"variance_partner_text": np.where(told, text, np.nan)} | shares


def _describe(found: xr.Dataset, share: float) -> xr.Dataset:
    """With units and a name on each variable."""
    unit = "nat" if asked_in(found) == "logprob" else "logit"
    square = f"{unit}\N{SUPERSCRIPT TWO}"
    told = {f"variance_{part}": (square, f"variance of self-repair by {part}") for part in PARTS}
    told["variance_partner_text"] = (square, "variance of self-repair by the partner's text as a whole")
    whose = "share of the variance of a token's self-repair that is the"
    told |= {f"{part}_share": ("1", f"{whose} {part}'s") for part in PARTS}
    for name, (units, text) in told.items():
        for each, over in ((name, throughout(found)), (f"top_{name}", among(share, found))):
            if each in found:
                found[each].attrs = {"units": units, "long_name": f"{text}, {over}"}
    return described_widths(found)
