"""The kinds of place that a case ablates: what each keeps of a clean pass, is worth, writes, and where its pass begins.

A place in the order of a pass is (layer, inside): before a layer, or inside it, behind its attention. Places compare.
"""

import torch

from selfrepair_nn.tracing.clean import layer_on, layers_on
from selfrepair_nn.tracing.objects import Bundle, Label
from selfrepair_nn.tracing.readouts import along, among, behind_norm, per_head, product, widen


class Edit(Bundle):
    """What a case does at one of its sites.

    `effects` is ⟨x, d_t⟩ of the site before and after, [prompt, position] each. `written` [prompt, position, d_model]
    is added where the case's pass begins: to what the attention gives where that is inside a layer, else to the
    stream. Or else `new` takes the site's place when the pass comes to it. With `inserted`, ⟨written, d_t⟩, nothing is
    replaced, and what the site does afterwards is what the pass shows.
    """

    effects: tuple
    written: object = None
    new: object = None
    inserted: object = None

    @property
    def seen(self):
        """Whether the pass itself shows what the site does."""
        return self.new is not None or self.inserted is not None


class Activation:
    """A site with a value of its own, of which a replacement takes the place.

    `kept` is what a clean pass keeps of it, `part` the part of a layer whose changes include it. What takes `sites`
    takes several of the site's own kind and layer, and their values [site, prompt, position, …], at once.
    """

    def needs(self):
        """What of a clean pass it is read from: {what: layers}."""
        return {self.kept: {self.layer}}

    def behind(self, plan):
        """The first place that it can change."""
        return self.layer + 1, False

    def constant(self, block):
        """The part of its value that no input changes."""
        return block.probed["direction"].new_zeros(())

    def edits(self, sites, replacement, block, start):
        """What `replacement` does to each of `sites` in a pass that begins at `start`: [Edit]."""
        before = self.values(sites, block)
        new = torch.stack([replacement.new(s, x, block) for s, x in zip(sites, before, strict=True)])
        pairs = zip(*(block.home(self.effects(sites, x, block)) for x in (before, new)), strict=True)
        if self.behind(block.plan) <= start:
            written = self.added(sites, widen(new) - widen(before), block)
            return [Edit(pair, written=x) for pair, x in zip(pairs, written, strict=True)]
        return [Edit(pair, new=x) for pair, x in zip(pairs, new, strict=True)]

    def values(self, sites, block):
        """What the sites are worth in the clean run: [site, prompt, position, …]."""
        return torch.stack([site.value(block.clean, block.plan) for site in sites])

    def clean_effects(self, sites, block):
        """⟨x, d_t⟩ of each of `sites` in the clean run: [site, prompt, position]."""
        return self.effects(sites, self.values(sites, block), block)

    def added(self, sites, changes, block):
        """What changes of sites add where their passes begin: [site, prompt, position, d_model]."""
        return self.writes(sites, changes, block)

    def own_change(self, edit, block):
        """What the change of what it writes adds to the residual stream: [prompt, position, d_model]."""
        before = self.value(block.clean, block.plan)
        new = block.plan["replacement"].new(self, before, block)
        return self.writes([self], (widen(new) - widen(before))[None], block)[0]

    def component_changes(self, index, pair, clean):
        """Its own change of direct effect: (where it stands among the components, the change)."""
        return index[self.component], pair[1] - pair[0]

    def neuron_changes(self, layer, pair, clean):
        """Its own change of a layer's neurons: (which, their change, the MLP's), or None."""


class Head(Label, Activation):
    """An attention head: its z, what it reads out before the output projection."""

    layer: int
    head: int
    kept, part = "z", "heads"

    def behind(self, plan):
        """Its own layer's MLP sees it, unless they work side by side."""
        return (self.layer + 1, False) if plan["model"]["parallel"] else (self.layer, True)

    @property
    def component(self):
        return "head", self.layer, self.head

    def value(self, kept, plan):
        return per_head(kept["z"][self.layer], plan)[:, :, self.head]

    def put(self, z, rows, new, plan):
        per_head(z, plan)[rows, :, self.head] = new.to(z.dtype)

    def constant(self, block):
        return block.probed["value_constant"][self.layer][self.head]

    def given(self, sites, changes, block):
        """What the output projection makes of changes of z."""
        heads = among([site.head for site in sites], changes.device)
        through = block.probed["output_projection"][self.layer][heads]
        return product(changes.flatten(1, 2), through).unflatten(1, changes.shape[1:3])

    def added(self, sites, changes, block):
        inside = self.behind(block.plan)[1]
        return (self.given if inside else self.writes)(sites, changes, block)

    def writes(self, sites, changes, block):
        scaled = block.plan["model"]["write_scale"] * self.given(sites, changes, block)
        return behind_norm(scaled, block.probed, block.clean, self.layer)

    def effects(self, sites, values, block):
        heads = among([site.head for site in sites], values.device)
        through = per_head(block.probed["pullback"][self.layer], block.plan)[:, :, heads].movedim(2, 0)
        constant = block.probed["value_constant"][self.layer][heads][:, None, None]
        return ((widen(values) - constant) * through).sum(-1)


class Mlp(Label, Activation):
    """A whole MLP: what it writes."""

    layer: int
    kept, part = "mlp", "mlps"

    @property
    def component(self):
        return "mlp", self.layer

    def value(self, kept, plan):
        return kept["mlp"][self.layer]

    def put(self, out, rows, new, plan):
        out[rows] = new.to(out.dtype)

    def writes(self, sites, changes, block):
        return block.plan["model"]["write_scale"] * changes

    def effects(self, sites, values, block):
        return along(values, block.probed["given_direction"])


class Neuron(Label, Activation):
    """A neuron of an MLP: its activation before the down projection."""

    layer: int
    neuron: int
    kept, part = "neurons", "mlps"

    @property
    def component(self):
        return "mlp", self.layer

    def value(self, kept, plan):
        return kept["neurons"][self.layer][:, :, self.neuron]

    def put(self, neurons, rows, new, plan):
        neurons[rows, :, self.neuron] = new.to(neurons.dtype)

    def writes(self, sites, changes, block):
        neurons = among([site.neuron for site in sites], changes.device)
        return changes[..., None] * block.probed["down_projection"][self.layer][neurons][:, None, None]

    def effects(self, sites, values, block):
        neurons = among([site.neuron for site in sites], values.device)
        return widen(values) * block.probed["neuron_pullback"][self.layer][:, :, neurons].movedim(2, 0)

    def neuron_changes(self, layer, pair, clean):
        change = pair[1] - pair[0]
        return (self.neuron, change, change) if layer == self.layer else None


class Rebuilt:
    """Whole layers: the residual stream behind them is made anew, whatever replaces other sites."""

    kept = part = None

    def needs(self):
        return {"input": {self.layer}}

    def behind(self, plan):
        return self.stop, False

    def edits(self, sites, replacement, block, start):
        return [site.edit(block) for site in sites]

    def edit(self, block):
        entering, leaving = (widen(block.clean["input"][layer]) for layer in (self.layer, self.stop))
        entering, new = entering.to(leaving.device), widen(self.stream(block)).to(leaving.device)
        effects = tuple(block.home(along(x - entering, block.probed["direction"])) for x in (leaving, new))
        return Edit(effects, written=new - leaving)

    def clean_effects(self, sites, block):
        return torch.stack([site.edit(block).effects[0] for site in sites])

    def own_change(self, edit, block):
        """What is taken away and put in its place: [prompt, position, d_model]."""
        return edit.written

    def neuron_changes(self, layer, pair, clean):
        """None: what becomes of their neurons is not recorded."""


class Layers(Label, Rebuilt):
    """The layers from `layer` up to, not including, `stop`, deleted."""

    layer: int
    stop: int

    def stream(self, block):
        return block.clean["input"][self.layer]

    def component_changes(self, index, pair, clean):
        gone = [i for name, i in index.items() if name[1] in range(self.layer, self.stop)]
        return gone, -clean("component_effects")[..., gone]

    def neuron_changes(self, layer, pair, clean):
        if layer in range(self.layer, self.stop):
            return slice(None), -clean("neuron_effects"), -clean("mlp_direct_effect")
        return None


class Permuted(Label, Rebuilt):
    """The layers of a block, in the order in which they run."""

    order: tuple

    def __init__(self, order):
        self.order = tuple(order)

    @property
    def layer(self):
        return min(self.order)

    @property
    def stop(self):
        return max(self.order) + 1

    def stream(self, block):
        x = block.clean["input"][self.layer]
        for layer in self.order:
            x = layer_on(block.model, block.plan, block.arrays["tokens"], layer, x)
        return x


class Parallel(Label, Rebuilt):
    """The layers from `layer` up to, not including, `stop`: each reads what enters the first."""

    layer: int
    stop: int

    def stream(self, block):
        entering = block.clean["input"][self.layer]
        between = range(self.layer, self.stop)
        written = layers_on(block.model, block.plan, block.arrays["tokens"], between, entering)
        return widen(entering) + written.to(entering.device)


KINDS = {"head": Head, "mlp": Mlp, "neuron": Neuron, "layers": Layers, "permuted": Permuted, "parallel": Parallel}
"""By the word that a plan has for each."""


def site_of(entry):
    """A site from its kind and its numbers, as plans write it."""
    kind, *numbers = entry
    return KINDS[kind](*numbers)
