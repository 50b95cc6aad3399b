"""What the final norm repairs: how much, as a share of the direct effect, and by which part (section 3)."""

from collections.abc import Iterator

import xarray as xr

from selfrepair_nn.analysis.checks import among, of_heads, share_of
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import Tokens
from selfrepair_nn.blocks import ratio_sums, ratios, read
from selfrepair_nn.face import public
from selfrepair_nn.quantities import QUANTITIES, asked_in

PARTS = ("norm_on_existing", "norm_on_change")


@public
def norm_by_head(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head), x over all counted tokens and top_x over the top share:

    - norm_on_existing, norm_on_change: means of the two parts of from_norm, in logits (Appendix B);
    - norm_ratio: mean of from_norm / direct_effect as it is, not clipped, no unit (Figure 10; 0 for a token of no
      direct effect). A few tokens of hardly any direct effect decide it: the clipped one is `norm_share`;
    - x_half_width of each, and of the means over heads, as in `by_head`.

    A result of this function is returned as it is, and of log-probability (`in_nats`) the summary of `by_head`. Memory
    and errors as in `by_head`.
    """
    if "norm_ratio" in ds or asked_in(ds) == "logprob":
        return by_head(ds, share)
    ds = of_heads(ds)
    share = share_of(ds, share)
    found = by_head(ds, share).assign(dict(_read_off(ds, share)))
    names = {n: f"mean {QUANTITIES[n].long_name}" for n in PARTS} | {
        "norm_ratio": "final norm / direct effect"
    }
    for name, text in names.items():
        units = QUANTITIES[name].units if name in PARTS else "1"
        found[name].attrs = {"units": units, "long_name": text}
        found[f"top_{name}"].attrs = {"units": units, "long_name": f"{text}, {among(share, found)}"}
    return described_widths(found)


def _read_off(ds: xr.Dataset, share: float) -> Iterator[tuple[str, tuple]]:
    tokens, _ = Tokens.of(ds, share)
    for name in (*PARTS, "from_norm"):
        sums, chosen = read(ds, name, tokens.done, tokens.top)
        if name == "from_norm":
            name, sums = "norm_ratio", ratio_sums(ds, "from_norm", "direct_effect", tokens.done)
            chosen = ratios(chosen, tokens.top.effect * tokens.top.sign)
        for each, tally in tokens.both(name, sums, chosen).items():
            yield from tokens.columns(each, tally.estimate).items()
