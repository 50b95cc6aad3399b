"""The kinds of place that a case ablates: what each keeps of a clean pass, is worth, writes, and where its pass begins.

A place in the order of a pass is (layer, inside): before a layer, or inside it, behind its attention. Places compare.
"""

from selfrepair_nn.tracing.clean import layer_on
from selfrepair_nn.tracing.objects import Bundle, Label
from selfrepair_nn.tracing.readouts import along, behind_norm, per_head, product, widen


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

    `kept` is what a clean pass keeps of it, `part` the part of a layer whose changes include it.
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

    def edit(self, replacement, block, start):
        """What `replacement` does to it in a pass that begins at `start`."""
        before = self.value(block.clean, block.plan)
        new = replacement.new(self, before, block)
        effects = block.home(self.effect(before, block)), block.home(self.effect(new, block))
        if self.behind(block.plan) <= start:
            return Edit(effects, written=self.added(widen(new) - widen(before), block))
        return Edit(effects, new=new)

    def added(self, change, block):
        """What a change of it adds where its pass begins."""
        return self.write(change, block)

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

    def given(self, change, block):
        """What the output projection makes of a change of z."""
        return product(change, block.probed["output_projection"][self.layer][self.head])

    def added(self, change, block):
        inside = self.behind(block.plan)[1]
        return self.given(change, block) if inside else self.write(change, block)

    def write(self, change, block):
        scaled = block.plan["model"]["write_scale"] * self.given(change, block)
        return behind_norm(scaled, block.probed, block.clean, self.layer)

    def effect(self, value, block):
        through = per_head(block.probed["pullback"][self.layer], block.plan)[:, :, self.head]
        return ((widen(value) - self.constant(block)) * through).sum(-1)


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

    def write(self, change, block):
        return block.plan["model"]["write_scale"] * change

    def effect(self, value, block):
        return along(widen(value), block.probed["given_direction"])


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

    def write(self, change, block):
        return change[..., None] * block.probed["down_projection"][self.layer][self.neuron]

    def effect(self, value, block):
        return widen(value) * block.probed["neuron_pullback"][self.layer][:, :, self.neuron]

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

    def edit(self, replacement, block, start):
        entering, leaving = (widen(block.clean["input"][layer]) for layer in (self.layer, self.stop))
        entering, new = entering.to(leaving.device), widen(self.stream(block)).to(leaving.device)
        effects = tuple(block.home(along(x - entering, block.probed["direction"])) for x in (leaving, new))
        return Edit(effects, written=new - leaving)

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


class Swap(Label, Rebuilt):
    """A layer and the next one, in each other's place."""

    layer: int

    @property
    def stop(self):
        return self.layer + 2

    def stream(self, block):
        tokens = block.arrays["tokens"]
        second = layer_on(block.model, block.plan, tokens, self.layer + 1, block.clean["input"][self.layer])
        return layer_on(block.model, block.plan, tokens, self.layer, second)


KINDS = {"head": Head, "mlp": Mlp, "neuron": Neuron, "layers": Layers, "swap": Swap}
"""By the word that a plan has for each."""


def site_of(entry):
    """A site from its kind and its numbers, as plans write it."""
    kind, *numbers = entry
    return KINDS[kind](*numbers)
