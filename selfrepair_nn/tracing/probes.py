"""Linear maps, learned by calling them on known vectors: the weights themselves may be hidden, sharded or quantised.

What `probe` takes and returns (told here, for the text of a function travels with each request, a module's does not):

Args:
    layers: decoder layers whose output projection is wanted.
    targets: token ids [prompt, position] whose logits are measured.
    others: token ids [prompt, position] whose logits are subtracted, for the target "difference".
    neurons: layers whose MLP's output projection is wanted.
    where: {layer: device} of those that may lie elsewhere than the final norm.
    known: Weights, of which only what is new is probed.

Returns, by name:

    output_projection {layer: [heads, d_head, d_model]}, output_bias {layer: [d_model]}
    post_gain {layer: [d_model]}             gamma of the norm behind the attention, where there is one
    value_constant {layer: [heads, d_head]}  the part of z that no input changes (zero if value_bias is "head")
    down_projection {layer: [neurons, d_model]}, norm_bias {(layer, which): [d_model]} of frozen norms
    direction [prompt, position, d_model]    d_t = C(gamma * u_t); given_direction the same for what attention and
                                             MLP give, which the model may multiply before it writes it
    constant [prompt, position]              k_t = <beta, u_t> + b_U[t]
    mean_direction [d_model], mean_constant [] the same for the mean row of the vocabulary
    raw_direction, raw_constant              those of the target's own row, where the model caps its logits
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.places import part, place
from selfrepair_nn.tracing.readouts import centre, norm_scale, product, sent, values_in, widen

UNEMBEDDING_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""How many numbers of the vocabulary's size may come at once: the fewer, the oftener the unembedding is read."""

LARGE = 1024.0
"""Length of the known vectors: beside it a bias, an epsilon or a rounding step is small. A power of two, so exact."""

OF_LAYERS = ("output_projection", "output_bias", "value_constant", "post_gain", "down_projection", "norm_bias")


class Weights(Bundle):
    """What was found of a model's weights, kept between jobs in the caller's process; the model does not change.

    `found` holds what `probe` returns of layers, and of the final norm and the unembedding; `vocabulary` [token] are
    token ids that will be asked for, so that the unembedding is read once. Conventions that differ are kept apart.
    """

    vocabulary: object = None
    found: object = None

    def of(self, plan):
        """What is known under a plan's conventions: to be looked up, and added to."""
        if self.found is None:
            self.found = {}
        return self.found.setdefault(plan["value_bias"], {name: {} for name in OF_LAYERS})


def probe(model, plan, layers, targets, others=None, neurons=(), where=(), known=None):
    """What direct effects need of the weights. What it takes and returns is told at the top."""
    known = Weights() if known is None else known
    found, wanted = known.of(plan), targets if others is None else torch.cat([targets, others])
    layers = [layer for layer in layers if layer not in found["output_projection"]]
    neurons = [layer for layer in neurons if layer not in found["down_projection"]]
    norms = [(layer, which) for layer, which in plan["frozen_norms"] if (layer, which) not in found["norm_bias"]]
    tokens = _new_tokens(found, wanted, known.vocabulary)
    if layers or neurons or norms or tokens is not None:
        new = _probed(model, plan, layers, neurons, norms, tokens, dict(where), targets[:1, :1])
        for name, value in new.items():
            found[name] = found[name] | value if name in OF_LAYERS else value
        if tokens is not None:
            found["tokens"] = tokens
    return found | _pull_back(plan, found, wanted, len(targets))


def measured_tokens(plan, arrays):
    """Whose logits are measured, and whose are subtracted or None: token ids [prompt, position] each.

    Of a prompt's last token too, which no other follows: some, for what they give is left out.
    """
    targets, others = arrays["tokens"][:, 1:], arrays["other"] if plan["target"] == "difference" else None
    return tuple(None if x is None else torch.cat([x, x[:, -1:]], 1) for x in (targets, others))


def _new_tokens(found, wanted, vocabulary):
    """The ids whose rows of the unembedding are to be probed, in ascending order; None if all are known."""
    wanted = wanted.cpu()
    if "tokens" in found and torch.isin(wanted, found["tokens"]).all():
        return None
    asked = wanted.flatten() if vocabulary is None else torch.cat([wanted.flatten(), vocabulary])
    return asked.unique()


def _probed(model, plan, layers, neurons, norms, tokens, where, first):
    """One trace that calls the modules on known vectors; `first` [1, 1] is a token to run it with."""
    with torch.no_grad(), model.trace(first, use_cache=False, logits_to_keep=no_logits(plan)):
        like = place(model, plan, "final_norm").input[0, :1]
        there = {layer: like.to(device) for layer, device in where.items()}
        found = save({name: {} for name in OF_LAYERS})
        for layer in layers:
            _probe_layer(model, plan, layer, there.get(layer, like), found)
        for layer in neurons:
            down = part(model, plan, layer, "down_projection")
            rows = _linear(down, there.get(layer, like), plan["model"]["d_mlp"])[0]
            found["down_projection"][layer] = plan["model"]["write_scale"] * rows
        for layer, which in norms:
            norm = part(model, plan, layer, f"{which}_norm")
            found["norm_bias"][layer, which] = _bias(norm, there.get(layer, like))
        if tokens is not None:
            norm = place(model, plan, "final_norm")
            found["norm_bias_final"], found["norm_gain_final"] = _probe_norm(norm, like, plan)
            found["rows"], found["biases"] = _probe_unembedding(model, plan, like, tokens)
    return found


def _probe_layer(model, plan, layer, like, found):
    projection = part(model, plan, layer, "output_projection")
    heads, width = plan["model"]["n_heads"], plan["model"]["d_head"]
    rows, bias = _linear(projection, like, heads * width)
    found["output_projection"][layer], found["output_bias"][layer] = rows.unflatten(0, (heads, width)), bias
    found["value_constant"][layer] = _value_constant(model, plan, layer, like)
    if "post_norm" in plan["model"]["places"]:
        found["post_gain"][layer] = _probe_norm(part(model, plan, layer, "post_norm"), like, plan)[1]


def _linear(projection, like, width):
    """A linear map of `width` inputs: its weights, a row for each input, from long unit vectors, and its bias."""
    bias = widen(projection(like.new_zeros(1, width)))
    rows = LARGE * torch.eye(width, dtype=like.dtype, device=like.device)
    return (widen(projection(rows)) - bias) / LARGE, bias[0]


def _bias(norm, like):
    """What a norm gives where nothing enters it."""
    return widen(norm(torch.zeros_like(like)))[0]


def _value_constant(model, plan, layer, like):
    """(W_V beta + b_V) per head: attention weights sum to 1, so this part of z never changes."""
    heads, width = plan["model"]["n_heads"], plan["model"]["d_head"]
    if plan["value_bias"] == "head" or not plan["model"]["value_bias"]:
        return widen(like.new_zeros(heads, width))
    constant = torch.zeros_like(like)
    if "attention_norm" in plan["model"]["places"]:
        constant = part(model, plan, layer, "attention_norm")(constant)
    own = values_in(widen(part(model, plan, layer, "value")(constant))[0], plan)
    return own.repeat_interleave(heads // own.shape[0], 0)


def _probe_norm(norm, like, plan):
    """A norm's bias, its output on zero, and its gain: from a large vector with no zero entry and mean zero."""
    bias, known = _bias(norm, like), _known(like)
    normed = widen(known) / norm_scale(known, plan)[..., None]
    return bias, (widen(norm(known))[0] - bias) / normed[0]


def _known(like):
    size = like.shape[-1]
    signs = torch.ones(size, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    if size % 2:
        signs[-3:] = torch.tensor([1, 1, -2], dtype=like.dtype, device=like.device)
    return LARGE * signs[None]


def _probe_unembedding(model, plan, like, tokens):
    """Rows of the unembedding for each of these tokens and, last, their mean over the vocabulary; biases likewise."""
    unembed = place(model, plan, "unembedding")
    eye = torch.eye(plan["model"]["d_model"], dtype=like.dtype, device=like.device)
    bias = widen(unembed(torch.zeros_like(eye[:1])))[0]
    wanted = tokens.to(bias.device)
    biases = torch.cat([bias[wanted], bias.mean()[None]])
    at_once = UNEMBEDDING_ELEMENTS.get(bias.device.type, UNEMBEDDING_ELEMENTS["cpu"])
    columns = []
    for rows in eye.split(max(1, at_once // bias.shape[0])):
        out = widen(unembed(LARGE * rows))
        columns.append((torch.cat([out[:, wanted], out.mean(-1, keepdim=True)], -1) - biases) / LARGE)
    return torch.cat(columns).T.contiguous().to(eye.device), biases.to(eye.device)


def _pull_back(plan, found, wanted, prompts):
    """d_t and k_t of every token from the probed norm and unembedding rows.

    `wanted` holds the targets of the `prompts`, followed, for the target "difference", by what is subtracted.
    """
    beta, gamma = found["norm_bias_final"], found["norm_gain_final"]
    distinct, inverse = wanted.cpu().unique(return_inverse=True)
    at = sent(torch.searchsorted(found["tokens"], distinct), beta.device)
    inverse = sent(inverse, beta.device)
    rows, biases = (plan["model"]["logit_scale"] * found[name][at] for name in ("rows", "biases"))
    mean_row, mean_bias = (plan["model"]["logit_scale"] * found[name][-1] for name in ("rows", "biases"))

    def pulled_back(shift):
        own, bias = rows - shift * mean_row, biases - shift * mean_bias
        return centre(gamma * own, plan)[inverse], (product(own, beta) + bias)[inverse]

    directions, constants = pulled_back(1.0 if plan["target"] == "centred" else 0.0)
    if plan["target"] == "difference":
        directions = directions[:prompts] - directions[prompts:]
        constants = constants[:prompts] - constants[prompts:]
    raw = {}
    if plan["model"]["logit_cap"] is not None:
        raw["raw_direction"], raw["raw_constant"] = (x[:prompts] for x in pulled_back(0.0))
    return raw | {
        "direction": directions,
        "given_direction": plan["model"]["write_scale"] * directions,
        "constant": constants,
        "mean_direction": centre(gamma * mean_row, plan),
        "mean_constant": (beta * mean_row).sum() + mean_bias,
    }
