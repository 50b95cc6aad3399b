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
