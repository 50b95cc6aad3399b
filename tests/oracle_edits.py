"""The independent oracle of every kind of edit: whole forward passes of the real model, edited by plain hooks.

Like `oracle`, on which it builds, it imports nothing of the package and reads the weights directly. Sites are plain
tuples: ("head", layer, head), ("attention", layer), ("mlp", layer), ("neuron", layer, neuron), ("layers", first, stop),
("permuted", order) and ("parallel", first, stop); what can only be frozen: ("norm", layer, "attention" or "mlp"),
("mixers",), ("postnorms",), ("finalnorm",). Replacements are
words, or ("scale", factor), ("constant", value), ("otherhead", head), ("reinforce", scale) and its
nulls, ("reinforcepartner", scale) and ("reinforcerandom", scale), or ("given", {site: value}). Layers are deleted and
permuted by doing so in the model's own list of layers; side by side they stand by hooks, each on what the first reads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import oracle
import torch
from torch import Tensor, nn

HOLDERS = {"gpt2": "transformer", "gptj": "transformer", "gpt_neox": "gpt_neox", "opt": "model.decoder"}
HOLDERS |= {"bloom": "transformer", "falcon": "transformer"}
LISTS = dict.fromkeys(("gpt2", "gptj", "bloom", "falcon"), "h")
MLP_NORMS = {"lfm2": "ffn_norm", "gpt2": "ln_2", "opt": "final_layer_norm"}
WHOLE = ("layers", "permuted", "parallel")
NO_OTHER_NORM = ("gptj", "olmo2", "falcon")
"""Where the MLP reads what the attention reads, or the stream as it is."""

DOWN_PROJECTIONS = {
    "gpt2": "mlp.c_proj",
    "gptj": "mlp.fc_out",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "lfm2": "feed_forward.w2",
    "bloom": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
}


@dataclass
class Edits:
    """What a pass is made to do, over all positions."""

    heads: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # z [prompt, T, head_dim]
    mlps: dict[int, Tensor] = field(default_factory=dict)  # output [prompt, T, d_model]
    mixers: dict[int, Tensor] = field(default_factory=dict)  # output [prompt, T, d_model]
    hidden: dict[int, Tensor] = field(default_factory=dict)  # all neurons [prompt, T, neurons]
    neurons: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # over `hidden`: [prompt, T]
    scales: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # what a norm divides by [prompt, T]
    final_scale: Tensor | None = None
    inserted: dict[int, Tensor] = field(default_factory=dict)  # into the layer's input [prompt, T, d_model]
    order: list[int] | None = None  # the layers that run, in this order
    parallel: range = range(0)  # layers that read what the first of them reads, their writes summed


@dataclass
class Seen(oracle.Pass):
    """What a pass showed, the neurons and the inputs of the layers' norms too."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    norm_inputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    entered: dict[int, Tensor] = field(default_factory=dict)  # the stream that enters each layer


class Edited:
    """A model on one block of prompts, ready to be edited.

    arrays: tokens, partner_tokens, counterfactual_tokens [prompt, T], edited_position [prompt], other [prompt, T - 1]
    (the tokens that are subtracted under the target "difference").
    """

    def __init__(self, model: nn.Module, arrays: dict[str, Tensor], target="centred", value_bias="output"):
        kind, self.ids, self.arrays = model.config.model_type, arrays["tokens"], arrays
        self.parts, self.value_bias = oracle.find_parts(model), value_bias
        self.body = model.get_submodule(HOLDERS.get(kind, "model"))
        self.list = LISTS.get(kind, "layers")
        self.blocks = list(getattr(self.body, self.list))
        named = MLP_NORMS.get(kind, "post_attention_layernorm")
        self.mlp_norms = [] if kind in NO_OTHER_NORM else [b.get_submodule(named) for b in self.blocks]
        own = [(i, layer.norm, layer.post) for i, layer in enumerate(self.parts.layers)]
        norms = {(i, "attention"): norm for i, norm, _ in own} | {(i, "post"): norm for i, _, norm in own}
        norms |= {(i, "mlp"): norm for i, norm in enumerate(self.mlp_norms)}
        self.norms = {name: norm for name, norm in norms.items() if norm is not None}
        down = DOWN_PROJECTIONS.get(kind, "mlp.down_proj")  # mixtures of experts have none of their own
        self.downs = [dict(b.named_modules()).get(down) for b in self.blocks]
        goal = (self.ids[:, 1:], arrays["other"]) if target == "difference" else target
        self.setting = oracle.Setting(self.parts, self.ids, goal, value_bias, None)
        self.goal = oracle._target(self.parts, self.ids, goal)
        self.clean = self.run(self.ids, Edits())
        self.sources = {
            "resample": self.run(arrays["partner_tokens"], Edits()),
            "counterfactual": self.run(arrays["counterfactual_tokens"], Edits()),
        }
        self.S_all = self.setting.scale(self.clean)
        self.S = self.S_all[:, :-1]
        self.labels = [w.label for w in self.setting.writes(self.clean, self.clean)]
        self.kinds = [w.kind for w in self.setting.writes(self.clean, self.clean)]
        self.effects = self._effects(self.clean)

    # ------------------------------------------------------------ passes

    def run(self, ids: Tensor, edits: Edits) -> Seen:
        """One full forward pass of the real model, with its own logits."""
        seen, shape = Seen({}, {}, {}), tuple(ids.shape)
        parts = self.parts
        pairs = [(parts.embed.register_forward_hook, oracle._note_hook(seen, "embed", shape))]
        if parts.pos_embed is not None:
            pairs.append((parts.pos_embed.register_forward_hook, oracle._note_hook(seen, "pos_embed", shape)))
        for i, layer in enumerate(parts.layers):
            if layer.mixer is None:
                attention = oracle._attention_hook(seen, i, parts.n_heads, edits.heads)
                pairs.append((layer.projection.register_forward_pre_hook, attention))
            else:
                mixer = oracle._mlp_hook(seen.mixer, i, shape, edits.mixers)
                pairs.append((layer.mixer.register_forward_hook, mixer))
            pairs += [
                (self.blocks[i].register_forward_pre_hook, _insert_hook(edits.inserted.get(i))),
                (layer.mlp.register_forward_hook, oracle._mlp_hook(seen.mlp, i, shape, edits.mlps)),
            ]
            if self.downs[i] is not None:
                pairs.append((self.downs[i].register_forward_pre_hook, _hidden_hook(seen, i, shape, edits)))
        for name, norm in self.norms.items():
            pairs.append((norm.register_forward_hook, _norm_hook(seen, name, shape, edits)))
        pairs += [(b.register_forward_pre_hook, _enter_hook(seen, i)) for i, b in enumerate(self.blocks)]
        pairs += [(add, hook) for add, hook in _side_by_side(self.blocks, edits.parallel)]
        pairs.append((parts.final_norm.register_forward_hook, oracle._final_hook(seen, edits.final_scale)))
        with torch.no_grad(), oracle._hooked(pairs), self._ordered(edits.order):
            seen.logits = parts.model(ids, use_cache=False).logits.double()
        seen.post = {i: x for (i, which), x in seen.norm_inputs.items() if which == "post"}
        return seen

    @contextmanager
    def _ordered(self, order: list[int] | None) -> Iterator[None]:
        """The model with its layers in another order, or without some of them, for the time of the block."""
        whole = getattr(self.body, self.list)
        if order is not None:
            setattr(self.body, self.list, nn.ModuleList([self.blocks[i] for i in order]))
        try:
            yield
        finally:
            setattr(self.body, self.list, whole)

    # ------------------------------------------------------------ one case

    def case(self, sites, replacement, freeze=()) -> dict[str, Tensor]:
        """Everything that is to be known of `sites`, replaced together while `freeze` keeps its clean values.

        [prompt, position] each, or with a last dimension component; neuron_change is {layer: [..., neuron]}.
        """
        edits, inserted = self._edits(sites, replacement, freeze)
        seen = self.run(self.ids, edits)
        effects = self._effects(seen)
        change = effects - self.effects
        own = [i for i, label in enumerate(self.labels) if any(self._covers(s, label) for s in sites)]
        rest = {
            kind: [i for i, k in enumerate(self.kinds) if k == kind and i not in own] for kind in self.kinds
        }
        neurons = [(s[1], s[2]) for s in sites if s[0] == "neuron"]
        before, after = (
            sum((self.neuron_effects(p, at)[..., i] for at, i in neurons), torch.zeros_like(self.S))
            for p in (self.clean, seen)
        )
        found = {
            "direct_effect": self.effects[..., own].sum(-1) + before,
            "ablated_direct_effect": effects[..., own].sum(-1) + after,
            "logit_change": self.setting.logit(seen) - self.setting.logit(self.clean),
            "mean_logit_change": (seen.logits - self.clean.logits)[:, :-1].mean(-1),
            "from_heads": change[..., rest["head"]].sum(-1),
            "from_mlps": change[..., rest["mlp"]].sum(-1) - (after - before),
            "ablated_norm_scale": self.S
            if edits.final_scale is not None
            else self.setting.scale(seen)[:, :-1],
            "stream_distance": self._moved(sites, seen),
            "ablated_residual_norm": seen.final[:, :-1].square().sum(-1).sqrt(),
            "component_change": change,
            "neuron_change": {
                layer: self.neuron_effects(seen, layer) - self.neuron_effects(self.clean, layer)
                for layer in seen.hidden
            },
        }
        if self.clean.mixer:
            found["from_mixers"] = change[..., rest["mixer"]].sum(-1)
        if self.clean.post:
            terms = self._from_post_norms(seen, edits)
            whole = {layer for s in sites if s[0] in WHOLE for layer in self._whole(s)}
            found["ablated_direct_effect"] += sum(terms.pop(layer, 0) for layer in whole)
            found["from_post_norms"] = sum(terms.values(), torch.zeros_like(self.S))
        if inserted is not None:
            found["inserted_direct_effect"] = (inserted[:, :-1] * self.goal.d).sum(-1) / self.S
        return found

    def in_nats(self, sites, replacement, freeze=()) -> dict[str, Tensor]:
        """What `oracle.in_nats` tells of the same, [prompt, position] each."""
        edits, alone = (self._edits(sites, replacement, each)[0] for each in (freeze, self._all()))
        under = replace(edits, final_scale=self.S_all)
        passes = [self.clean, *(self.run(self.ids, each) for each in (edits, under, alone))]
        return oracle.in_nats(*(each.logits for each in passes), self.ids)

    def _all(self) -> list[tuple]:
        """Everything that can be frozen."""
        layers = range(len(self.blocks))
        heads = [("head", layer, head) for layer in self.clean.z for head in range(self.parts.n_heads)]
        return [*heads, *(("mlp", layer) for layer in layers), ("mixers",), ("postnorms",), ("finalnorm",)]

    def _from_post_norms(self, seen: Seen, edits: Edits) -> dict[int, Tensor]:
        """What the norm behind each layer's attention adds; swapped layers count it with what they write."""
        found = {}
        for i, x in seen.post.items():
            if (i, "post") not in edits.scales:
                norm = self.norms[i, "post"]
                change = 1 / oracle.scale(norm, x) - 1 / oracle.scale(norm, self.clean.post[i])
                extra = change[..., None] * oracle.gain(norm) * x
                found[i] = (extra[:, :-1] * self.goal.d).sum(-1) / self.S
        return found

    def clean_values(self) -> dict[str, Tensor]:
        """What the job says of the clean run."""
        return {
            "logit": self.setting.logit(self.clean),
            "mean_logit": self.clean.logits[:, :-1].mean(-1),
            "target_constant": self.goal.k,
            "norm_scale": self.S,
            "component_direct_effect": self.effects,
            "residual_norm": self.clean.final[:, :-1].square().sum(-1).sqrt(),
        }

    def neuron_effects(self, seen: Seen, layer: int) -> Tensor:
        """DE of every neuron of a layer, by its row of the weights: [prompt, position, neuron]."""
        W = oracle._matrix(self.downs[layer])
        return seen.hidden[layer][:, :-1] * (self.goal.d @ W.T) / self.S[..., None]

    def _effects(self, seen: Seen) -> Tensor:
        """DE of every component under the clean scale; what did not run writes nothing."""
        gone = [i for i in range(len(self.blocks)) if i not in seen.mlp]
        for kept in ("z", "mixer", "mlp"):
            clean = getattr(self.clean, kept)
            getattr(seen, kept).update({i: clean[i] for i in gone if i in clean})
        effects = oracle._direct_effects(self.setting.writes(seen, self.clean), self.goal, self.S)
        for layer in gone:
            effects[..., [i for i, label in enumerate(self.labels) if _layer(label) == layer]] = 0
        return effects

    def _moved(self, sites, seen: Seen) -> Tensor:
        """How far the stream behind whole layers moved, as a share of what these write; 0 of other sites."""
        if sites[0][0] not in WHOLE:
            return torch.zeros_like(self.S)
        first, stop = self._whole(sites[0])[0], self._whole(sites[0])[-1] + 1
        entering, leaving, moved = (
            self._entering(*each) for each in ((self.clean, first), (self.clean, stop), (seen, stop))
        )
        return ((moved - leaving).norm(dim=-1) / (leaving - entering).norm(dim=-1))[:, :-1]

    def _entering(self, seen: Seen, layer: int) -> Tensor:
        """The stream that enters a layer; or the final norm, behind the last."""
        return seen.final if layer == len(self.blocks) else seen.entered[layer]

    def _covers(self, site, label: str) -> bool:
        """Whether a component is one of those that a site names."""
        kind, *numbers = site
        if kind in WHOLE:
            return _layer(label) in self._whole(site)
        if kind == "attention":
            return label.startswith(f"L{numbers[0]}H")
        return label == {"head": "L{}H{}", "mlp": "L{}.mlp", "neuron": ""}[kind].format(*numbers)

    # ------------------------------------------------------------ edits

    def _edits(self, sites, replacement, freeze) -> tuple[Edits, Tensor | None]:
        edits, layers = Edits(), list(range(len(self.blocks)))
        ablated = {single for s in sites for single in self._singles(s)}
        for site in {single for s in freeze for single in self._singles(s)} - ablated:
            self._freeze(site, edits)
        for site in ablated:
            if site[0] == "layers":
                edits.order = layers[: site[1]] + layers[site[2] :]
            elif site[0] == "permuted":
                edits.order = [*layers[: min(site[1])], *site[1], *layers[max(site[1]) + 1 :]]
            elif site[0] == "parallel":
                edits.order, edits.parallel = layers, range(*site[1:])
            elif replacement[0].startswith("reinforce"):
                edits.inserted[site[1]] = self._reinforcement(site, *replacement)
            else:
                where = {"head": edits.heads, "mlp": edits.mlps, "neuron": edits.neurons}[site[0]]
                where[site[1] if site[0] == "mlp" else site[1:]] = self._new(site, replacement)
        if edits.order is not None:
            whole = {layer for s in ablated for layer in self._whole(s)}
            edits.heads = {k: v for k, v in edits.heads.items() if k[0] not in whole}
            edits.hidden = {k: v for k, v in edits.hidden.items() if k not in whole}
            edits.scales = {k: v for k, v in edits.scales.items() if k[0] not in whole}
            edits.mixers = {k: v for k, v in edits.mixers.items() if k not in whole}
        return edits, next(iter(edits.inserted.values()), None)

    def _whole(self, site) -> range:
        """The layers that are deleted or moved as they are: nothing within them is frozen."""
        return range(min(site[1]), max(site[1]) + 1) if site[0] == "permuted" else range(*site[1:])

    def _singles(self, site):
        """A whole attention layer is all its heads."""
        if site[0] != "attention":
            return (site,)
        return tuple(("head", site[1], head) for head in range(self.parts.n_heads))

    def _freeze(self, site, edits: Edits) -> None:
        kind, clean = site[0], self.clean
        if kind == "head":
            edits.heads[site[1:]] = clean.z[site[1]][:, :, site[2]]
        elif kind == "mlp":
            edits.hidden[site[1]] = clean.hidden[site[1]]
        elif kind == "norm":
            edits.scales[site[1:]] = oracle.scale(self.norms[site[1:]], clean.norm_inputs[site[1:]])
        elif kind == "mixers":
            edits.mixers = dict(clean.mixer)
        elif kind == "postnorms":
            for layer, x in clean.post.items():
                edits.scales[layer, "post"] = oracle.scale(self.norms[layer, "post"], x)
        elif kind == "finalnorm":
            edits.final_scale = self.S_all
        else:
            raise ValueError(site)

    def _value(self, site, seen: Seen) -> Tensor:
        if site[0] == "mlp":
            return seen.mlp[site[1]]
        return (seen.z if site[0] == "head" else seen.hidden)[site[1]][:, :, site[2]]

    def _new(self, site, replacement) -> Tensor:
        """What takes the place of a site's value."""
        value = self._value(site, self.clean)
        word, number = (replacement, None) if isinstance(replacement, str) else replacement
        if word == "given":
            return number[site]
        if word in self.sources:
            return self._value(site, self.sources[word])
        if word == "mean":
            return value.mean((0, 1)).expand_as(value)
        if word == "constant":
            return torch.full_like(value, number)
        if word == "otherhead":
            return self._value(("head", *number), self.clean)
        factor = {"zero": 0.0, "identity": 1.0, "scale": number}[word]
        constant = self._constant(site)
        return constant + factor * (value - constant)

    def _constant(self, site) -> Tensor:
        """The part of a head's z that counts with the output bias."""
        none = torch.zeros((), dtype=torch.float64)
        if site[0] != "head" or self.value_bias == "head":
            return none
        constant = oracle.value_constant(self.parts.layers[site[1]])
        return none if constant is None else constant[site[2]]

    def _reinforcement(self, site, word: str, scale: float) -> Tensor:
        """The head's write times `scale`, or what its null adds, at the edited position of each prompt."""
        layer = self.parts.layers[site[1]]
        W = layer.W_O.unflatten(0, (self.parts.n_heads, -1))[site[2]]
        seen = self.sources["resample"] if word == "reinforcepartner" else self.clean
        own = (self._value(site, seen) - self._constant(site)) @ W
        if layer.post is not None:
            own = own * oracle.gain(layer.post) / oracle.scale(layer.post, self.clean.post[site[1]])[..., None]
        if word == "reinforcerandom":
            direction = self.arrays["random_direction"].double()
            width, turn = direction.shape[1], site[1] * self.parts.n_heads + site[2]
            turned = direction[:, [(place - turn) % width for place in range(width)]]
            lengths = (own**2).sum(-1) ** 0.5 / (turned**2).sum(-1)[:, None] ** 0.5
            own = lengths[..., None] * turned[:, None]
        added = torch.zeros_like(own)
        for prompt, position in enumerate(self.arrays["edited_position"].tolist()):
            added[prompt, position] = scale * own[prompt, position]
        return added


def _layer(label: str) -> int:
    """The layer of a component, -1 for embeddings."""
    return int(label[1:].replace("H", ".").split(".")[0]) if label.startswith("L") else -1


def _side_by_side(blocks, layers: range) -> Iterator[tuple[Callable, Callable]]:
    """Each of these blocks on the stream that enters the first; the last one gives that and what all of them write."""
    entered, written = [], []

    def enter(module, args):
        if module is blocks[layers[0]]:
            entered[:], written[:] = [args[0]], []
        return (entered[0], *args[1:])

    def leave(module, args, output):
        whole = isinstance(output, tuple)
        written.append((output[0] if whole else output) - entered[0])
        if module is blocks[layers[-1]]:
            given = entered[0] + torch.stack(written).sum(0)
            return (given, *output[1:]) if whole else given
        return None

    for layer in layers:
        yield blocks[layer].register_forward_pre_hook, enter
        yield blocks[layer].register_forward_hook, leave


def _enter_hook(seen: Seen, layer: int) -> Callable:
    """Before a layer: note the stream that enters it."""

    def hook(module, args):
        seen.entered[layer] = args[0].double().clone()

    return hook


def _insert_hook(added: Tensor | None) -> Callable:
    """Before a layer: add to the residual stream that enters it."""

    def hook(module, args):
        return None if added is None else (args[0] + added, *args[1:])

    return hook


def _norm_hook(seen: Seen, name: tuple[int, str], shape: tuple[int, int], edits: Edits) -> Callable:
    """After a layer's norm: note its input; normalise by the scale asked for instead of its own."""

    def hook(module, args, output):
        x = args[0].double().reshape(*shape, -1)
        seen.norm_inputs[name] = x
        if name in edits.scales:
            normed = oracle.centre(module, x) / edits.scales[name][..., None]
            return (
                (oracle.gain(module) * normed + oracle.offset(module)).to(output.dtype).reshape(output.shape)
            )

    return hook


def _hidden_hook(seen: Seen, layer: int, shape: tuple[int, int], edits: Edits) -> Callable:
    """Before the MLP's last projection: replace all neurons, or some, note what the projection then gets."""

    def hook(module, args):
        hidden = edits.hidden.get(layer, args[0].reshape(*shape, -1)).clone()
        for (at, neuron), value in edits.neurons.items():
            if at == layer:
                hidden[:, :, neuron] = value
        seen.hidden[layer] = hidden.double()
        return (hidden.reshape(args[0].shape), *args[1:])

    return hook
