"""Self-repair in log-probability, in nats, beside self-repair in logits."""

import json
from collections.abc import Iterator

import xarray as xr

from selfrepair_nn.analysis.checks import among, of_heads, require, restored, share_of
from selfrepair_nn.analysis.summaries import by_head, described_widths, own_loss
from selfrepair_nn.analysis.tokens import Tokens
from selfrepair_nn.blocks import read
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import IN_NATS, QUANTITIES, asked_in

READ = ("logprob_change", "self_repair_logprob", "norm_logprob", "entropy_change", "kl")


@public
def in_nats(ds: xr.Dataset) -> xr.Dataset:
    """A store of which every summary and figure is of log-probability, in nats, where it can be.

    logit_change, self_repair and from_norm are then logprob_change, self_repair_logprob and norm_logprob, and what
    else is in logits is left out, but for the direct effects by which tokens are ranked. Of `by_head` direct_effect and
    removed are what the head's own write alone takes from the log-probability, self_repair - logit_change. Where only
    the top share is kept of log-probability (`--logprob top`), what is over all tokens is NaN.

    Raises:
        UsageError: the store holds no log-probability.
    """
    ds = restored(ds)
    if asked_in(ds) == "logprob":
        return ds
    require(ds, ("self_repair",))
    if "position" not in ds.dims:
        raise UsageError("this is a summary in logits: give its store, or a summary of in_nats(store)")
    if "logprob_change" not in ds:
        raise UsageError("this store holds no log-probability: run its recipe with --logprob top, or all")
    swept = [name for name, q in QUANTITIES.items() if name in ds.data_vars and q.ablated and q.units == "logit"]
    others = {*swept, "noise_floor", "estimate", "half_width", "layer_estimate", "layer_half_width"} - {"closure"}
    nats = {name: ds[each] for name, each in IN_NATS.items()}
    kept = {"kept_share": share} if (share := _kept(ds)) < 1 else {}
    return ds.drop_vars(others, errors="ignore").assign(nats).assign_attrs(outcome="logprob", **kept)


def _kept(ds: xr.Dataset) -> float:
    """The share of each head's tokens whose log-probability is kept."""
    settings = json.loads(ds.attrs.get("settings", "{}"))
    every = settings.get("logprob") == "all" or settings.get("share") is None
    return ds.attrs.get("kept_share", 1.0 if every else settings["share"])


@public
def outcomes_by_head(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and beside it in nats over (layer, head), x of all tokens and top_x of the top share:

    - logprob_change, self_repair_logprob, norm_logprob: means of what the log-probability of the next token does,
      as logit_change, self_repair and from_norm of its logit; removed_logprob = self_repair_logprob - logprob_change,
      what the head's own write alone takes, the norm frozen;
    - entropy_change, kl: means of the change of the next-token distribution's entropy, and of its divergence;
    - x_half_width of each, and of the means over heads, as in `by_head`.

    A result of this function is returned as it is. Memory and errors as in `by_head` and `in_nats`.
    """
    if "top_self_repair_logprob" in ds:
        return by_head(ds, share)
    ds = of_heads(ds)
    share = share_of(ds, share)
    found = by_head(ds, share).assign(dict(_read_off(in_nats(ds), share)))
    named = {name: QUANTITIES[name].long_name for name in READ}
    for name, text in (named | {"removed_logprob": "log-probability that the own write takes"}).items():
        units, text = "nat", f"mean {text}"
        found[name].attrs = {"units": units, "long_name": text}
        found[f"top_{name}"].attrs = {"units": units, "long_name": f"{text}, {among(share, found)}"}
    return described_widths(found)


def _read_off(ds: xr.Dataset, share: float) -> Iterator[tuple[str, tuple]]:
    tokens, _ = Tokens.of(ds, share)
    own = tokens.both("removed_logprob", *own_loss(ds, tokens))
    for name in READ:
        sums, chosen = read(ds, name, tokens.done, tokens.top)
        for each, tally in tokens.both(name, sums, chosen).items():
            yield from tokens.columns(each, tally.estimate).items()
    for each, tally in own.items():
        yield from tokens.columns(each, tally.estimate).items()
