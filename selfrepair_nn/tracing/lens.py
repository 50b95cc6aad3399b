"""Which tokens a write promotes and demotes: its product with the unembedding, under the clean final norm.

With g as in `outcomes`, a write w raises the logit of token v by W g(w) less its mean over the vocabulary. Of that the
highest and the lowest entries of a few tokens are kept: of what a case's sites write, and of what the components whose
direct effect changes most then write more or less than before. By calls of the model's own modules, in pieces; no more
than these few entries is kept of a product.
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.readouts import per_head, product, sent, widen
from selfrepair_nn.tracing.terms import component_index
from selfrepair_nn.tracing.vocabulary import final_stream, joined, normed_by, of_sites, unembedding


class Words(Bundle):
    """What is recorded of words, as an object of the plan: its code goes only with a request that asks for them.

    `count` is how many tokens of either end are kept, `movers` of how many components.
    """

    count: int
    movers: int

    def kept(self, batch, top, state):
        """Where the kept tokens of a pass are: rows, positions and places among all clean tokens; and `top` itself.

        `top(effect)` tells of direct effects [row, position] which are kept.
        """
        effect = batch.in_rows(lambda case: case.effect(0)) / batch.of(state["norm_scale"])
        which = top(effect[:, : state["norm_scale"].shape[1] - 1])
        row, position = which.nonzero(as_tuple=True)
        return row, position, batch.prompts[row] * state["norm_scale"].shape[1] + position, which

    def watched(self, x, what, layer, block, batch):
        """The change of an activation [row, position, width] at the kept tokens: [token, width]."""
        row, position, token = (sent(each, x.device) for each in batch.kept[:3])
        return widen(x[row, position]) - widen(block.clean[what][layer]).flatten(0, 1)[token]

    def of_pass(self, block, batch, changes, results, state):
        """The words of the kept tokens of a pass, {name: [row, position, …]}; NaN (or -1) for the others."""
        row, position, token, which = batch.kept
        scale = state["norm_scale"].flatten()[token]
        movers, effects = self._movers(block, batch, changes, scale)
        vectors = [
            of_sites(lambda site, edit: write_of(site, block), block, batch, which),
            of_sites(lambda site, edit: site.own_change(edit, block), block, batch, which),
            widen(block.home(changes["final"])[row, position]) - widen(final_stream(block)).flatten(0, 1)[token],
            *(_change_of(each, block, changes["watched"], token) for each in movers.unbind(-1)),
        ]
        vectors = [normed_by(block, x, scale) for x in vectors]
        stretch = scale / results["ablated_norm_scale"][which]
        found = joined(self._in_words(block, token, stretch, vectors, state), block)
        found |= {"changed_component": movers, "changed_effect": effects}
        return {name: _placed(x, which) for name, x in found.items()}

    def _movers(self, block, batch, changes, scale):
        """The components whose direct effect changes most, the ablated left out: indices and changes [token, mover]."""
        row, position, index = *batch.kept[:2], component_index(block.plan)
        out = scale.new_zeros(len(scale), len(index))
        for layer, x in changes["heads"].items():
            first = index["head", layer, 0]
            out[:, first : first + x.shape[-1]] = block.home(x)[row, position]
        for kind in ("mixer", "mlp"):
            for layer, x in changes[f"{kind}s"].items():
                out[:, index[kind, layer]] = block.home(x)[row, position]
        for rows, case, _ in batch.each():
            for site in (site for site in case.edits if site.kept):
                out[(row >= rows.start) & (row < rows.stop), index[site.component]] = 0
        out = out / scale[:, None]
        most = out.abs().sort(stable=True, dim=-1, descending=True)[1][:, : self.movers]
        return most, out.gather(-1, most)

    def _in_words(self, block, token, stretch, vectors, state):
        """The products with the vocabulary, in parts; `vectors` are what leaves the final norm, [token, d_model] each.

        The write, its change, the whole change under the clean norm, and the changes of the components.
        """
        whole = normed_by(block, final_stream(block), state["norm_scale"]).flatten(0, 1)[token]
        beta, first = block.probed["norm_bias_final"], block.arrays["tokens"][:1, :1]
        with torch.no_grad(), block.model.trace(first, use_cache=False, logits_to_keep=no_logits(block.plan)):
            parts = save([])
            unembed = unembedding(block)
            constant, at_once = unembed.logits(beta[None]), unembed.at_once
            for clean, ratio, *given in zip(*(x.split(at_once) for x in (whole, stretch, *vectors)), strict=True):
                found = self.ends(centred(unembed.change(given[0])), "promoted", "demoted")
                own, frozen = unembed.change(given[1]), unembed.change(given[2])
                ratio = ratio.to(constant.device)[:, None]
                live = (ratio - 1) * (unembed.logits(clean + beta) - constant) + ratio * frozen
                for name in ("promoted", "demoted"):
                    moved = (centred(x).gather(-1, found[name]) for x in (own, live))
                    after, found[f"{name}_logit_change"] = moved
                    found[f"ablated_{name}_effect"] = found[f"{name}_effect"] + after
                each = [self.ends(centred(unembed.change(x)), "change_promoted", "change_demoted") for x in given[3:]]
                parts.append(found | {name: torch.stack([one[name] for one in each], 1) for name in each[0]})
        return parts

    def ends(self, logits, high, low):
        """The tokens of highest and of lowest logit and these logits: [token, word] each."""
        (most, top), (least, bottom) = (logits.topk(self.count, largest=largest) for largest in (True, False))
        return {high: top, f"{high}_effect": most, low: bottom, f"{low}_effect": least}


def centred(logits):
    return logits - logits.mean(-1, keepdim=True)


def write_of(site, block):
    """What a site writes in the clean run: [prompt, position, d_model]."""
    if not site.kept:  # whole layers
        entering, leaving = (block.home(widen(block.clean["input"][at])) for at in (site.layer, site.stop))
        return leaving - entering
    value = widen(site.value(block.clean, block.plan))
    constant = site.constant(block).to(value.device)
    return site.writes([site], (value - constant)[None], block)[0]


def _change_of(movers, block, watched, token):
    """What the change of a component adds to the stream, of one component a token: [token, d_model]."""
    names = list(component_index(block.plan))
    out = block.probed["direction"].new_zeros(len(token), block.plan["model"]["d_model"])
    for index in movers.unique().tolist():
        at = (movers == index).nonzero()[:, 0]
        out[at] = block.home(_of_component(names[index], at, block, watched, token))
    return out


def _of_component(name, at, block, watched, token):
    kind, layer, *head = name
    found = watched.get(("z" if head else kind, layer))
    if found is None:  # nothing of it can change
        return block.probed["direction"].new_zeros(())
    written = found[at.to(found.device)]
    if head:
        through = block.probed["output_projection"][layer][head[0]]
        written = product(per_head(written, block.plan)[:, head[0]], through)
    written = block.plan["model"]["write_scale"] * written
    if head and layer in block.probed["post_gain"]:
        scale = block.clean["post_scale"][layer].flatten()[token[at].to(written.device)]
        written = written * block.probed["post_gain"][layer] / scale[:, None]
    return written


def _placed(x, which):
    """Values [token, …] at the places of their tokens, NaN (or -1) at the others: [row, position, …]."""
    out = x.new_full((*which.shape, *x.shape[1:]), float("nan") if x.is_floating_point() else -1)
    out[which] = x
    return out
