"""What takes the place of a site's value. A plan names one, with its numbers; arrays hold what varies by prompt."""

import torch

from selfrepair_nn.tracing.attention import attention, entering, read_out, share_of
from selfrepair_nn.tracing.gaussian import gaussian
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.readouts import along, widen
from selfrepair_nn.tracing.sites import Edit, site_of


class Replacement:
    """`text` names the other tokens, if any, that values are taken from."""

    text = None

    def needs(self, cases):
        """What it reads of a clean pass beside the sites themselves: {what: layers}."""
        return {}

    def begins(self, case, plan):
        """Where a case's pass begins: at the first place that its first site can change."""
        return min(site.behind(plan) for site in case)

    def edits(self, sites, block, start):
        """What becomes of sites, all of one kind and layer, in passes that begin at `start`: [Edit]."""
        return sites[0].edits(sites, self, block, start)


class Identity(Replacement):
    """What was there."""

    def new(self, site, before, block):
        return site.value(block.source, block.plan)


class Resample(Identity):
    """The same site's value on the partner's tokens."""

    text = "partner_tokens"


class Counterfactual(Identity):
    """The same site's value on a minimally different text."""

    text = "counterfactual_tokens"


class Mean(Replacement):
    """The mean over reference prompts: arrays["means"] {what: {layer: [width]}}."""

    def new(self, site, before, block):
        mean = block.arrays["means"][site.kept][site.layer][None, None].to(before.device, before.dtype)
        return site.value({site.kept: {site.layer: mean}}, block.plan).expand_as(before)


class Zero(Replacement):
    """Nothing but what no input changes."""

    def new(self, site, before, block):
        return site.constant(block).to(before).expand_as(before)


class Scale(Bundle, Replacement):
    """The site's own value times `factor`."""

    factor: float

    def new(self, site, before, block):
        constant = site.constant(block).to(before)
        return constant + self.factor * (before - constant)


class Constant(Bundle, Replacement):
    """`value` in every entry, or a vector of them."""

    value: object

    def new(self, site, before, block):
        return torch.as_tensor(self.value, dtype=before.dtype, device=before.device).expand_as(before)


class Constants(Bundle, Replacement):
    """A vector for each site: arrays[KIND + "_constants"] [site, width], in the order of `sites` {kind: [numbers]}."""

    sites: dict

    def new(self, site, before, block):
        kind = type(site).__name__.lower()
        row = self.sites[kind].index([*vars(site).values()])
        return block.arrays[f"{kind}_constants"][row].to(before).expand_as(before)


class Noise(Bundle, Replacement):
    """The site's own value, and Gaussian noise of `scale` times its root mean square there: arrays["noise_seed"]."""

    scale: float

    def new(self, site, before, block):
        varied = widen(before) - site.constant(block)
        flat = varied.reshape(*before.shape[:2], -1)
        drawn = gaussian(block.arrays["noise_seed"], [*site.kept.encode(), *vars(site).values()], flat.shape)
        noise = self.scale * flat.square().mean(-1, keepdim=True).sqrt() * drawn.to(flat)
        return widen(before) + noise.view(before.shape)


class KnockOut(Bundle, Replacement):
    """What a head reads out without some of its edges from a query to a key.

    Cut are edges so far `back`, to these `keys`, and to the `most` attended keys of each query; arrays["keys"]
    [prompt, key] and arrays["edges"] [prompt, edge, (query, key)] have more of each prompt, -1 for none.
    """

    softmax: str
    back: list
    keys: list
    most: int

    def needs(self, cases):
        return entering(cases)

    def new(self, site, before, block):
        pattern, values = (widen(x[:, site.head]) for x in attention(block, site.layer))
        sinks, constant = "sinks" in block.plan["model"]["places"], site.constant(block)
        left = pattern.masked_fill(self.edges_cut(pattern, block.arrays), 0)
        now, after = (read_out(x, pattern, values - constant, self.softmax == "live", sinks) for x in (pattern, left))
        rounded = (widen(before) - constant - now) * share_of(left, pattern)
        return constant + after + rounded

    def edges_cut(self, pattern, arrays):
        """Of a head's pattern [prompt, query, key], perhaps without its last queries: bool, of its shape."""
        found = torch.zeros_like(pattern, dtype=torch.bool)
        place = torch.arange(pattern.shape[-1], device=pattern.device)
        for distance in self.back:
            found |= place[: pattern.shape[1], None] - place == distance
        for key in self.keys:
            found |= place == key
        if self.most:
            found.scatter_(-1, pattern.sort(dim=-1, descending=True, stable=True)[1][..., : self.most], True)
        if "keys" in arrays:
            found |= (place == arrays["keys"].to(place)[..., None]).any(1)[:, None]
        if "edges" in arrays:
            edges = arrays["edges"].to(place)
            asked = (edges[..., 1] >= 0) & (edges[..., 0] < pattern.shape[1])
            prompt, edge = asked.nonzero(as_tuple=True)
            found[prompt, *edges[prompt, edge].unbind(-1)] = True
        return found


class OtherHead(Bundle, Replacement):
    """What another head of the same prompt reads out."""

    head: list

    def needs(self, cases):
        return site_of(self.head).needs()

    def new(self, site, before, block):
        return site_of(self.head).value(block.source, block.plan).to(before.device)


class Reinforce(Bundle, Replacement):
    """No replacement: `scale` times the head's own write is added to what its layer reads, at the edited position."""

    scale: float

    def begins(self, case, plan):
        return case[0].layer, False

    def added(self, sites, block):
        """What is added, before it is scaled: [site, prompt, position, d_model]."""
        return _written(sites, block, block.clean)

    def edits(self, sites, block, start):
        values, kind, added = sites[0].values(sites, block), sites[0], self.added(sites, block)
        edited = block.arrays["edited_position"].to(added.device)[:, None]
        here = edited == torch.arange(added.shape[2], device=added.device)
        written, effects = self.scale * added * here[..., None], block.home(kind.effects(sites, values, block))
        inserted = block.home(along(written, block.probed["direction"]))
        found = zip(effects, written, inserted, strict=True)
        return [Edit((effect, effect), written=w, inserted=i) for effect, w, i in found]


class ReinforcePartner(Reinforce):
    """What the head writes on the partner's tokens is added instead."""

    text = "partner_tokens"

    def added(self, sites, block):
        return _written(sites, block, block.source)


class ReinforceRandom(Reinforce):
    """A random direction of the same length is added instead: another for each head, turned from one of each prompt."""

    def added(self, sites, block):
        own = super().added(sites, block)
        direction, n_heads = block.arrays["random_direction"].to(own), block.plan["model"]["n_heads"]
        turned = [direction.roll(site.layer * n_heads + site.head, -1) for site in sites]
        return own.norm(dim=-1, keepdim=True) * torch.stack(turned)[:, :, None]


def _written(sites, block, kept):
    """What heads of one layer write of their values in a pass: [site, prompt, position, d_model]."""
    values = torch.stack([site.value(kept, block.plan) for site in sites])
    constants = torch.stack([site.constant(block) for site in sites])[:, None, None]
    return sites[0].writes(sites, widen(values) - constants, block)


KINDS = {
    "identity": Identity,
    "resample": Resample,
    "counterfactual": Counterfactual,
    "mean": Mean,
    "zero": Zero,
    "scale": Scale,
    "constant": Constant,
    "constants": Constants,
    "noise": Noise,
    "knockout": KnockOut,
    "otherhead": OtherHead,
    "reinforce": Reinforce,
    "reinforcepartner": ReinforcePartner,
    "reinforcerandom": ReinforceRandom,
}
"""By the word that a plan has for each."""


def replacement_of(entry):
    """A replacement from its kind and its numbers, as plans write it."""
    numbers = dict(entry)
    return KINDS[numbers.pop("kind")](**numbers)
