"""Finding a module by the dotted path that the plan gives."""

from functools import reduce


def at(root, path):
    """The module at a dotted path below `root`."""
    return reduce(getattr, path.split("."), root)


def place(model, plan, name):
    """A module named in the plan's places, below the whole model."""
    return at(model, plan["model"]["places"][name])


def part(model, plan, layer, name):
    """A module named in the plan's places, below decoder layer `layer`."""
    return at(place(model, plan, "layers")[layer], plan["model"]["places"][name])


def written(module):
    """The tensor that a module gives: what it returns, or the first of what it returns."""
    found = module.output
    return found[0] if isinstance(found, tuple) else found


def like_rows(out, tokens):
    """Some MLPs work on flattened tokens: give their tensors the shape [row, position, …] again, as a view."""
    return out.view(*tokens.shape, -1)


def skip(module, plan, name, x):
    """Let `x` stand for what a module would have written. Of what it returns beside that nothing is ever used."""
    others = plan["model"]["returns"].get(name, 1) - 1
    module.skip((x, *[None] * others) if name in plan["model"]["returns"] else x)
