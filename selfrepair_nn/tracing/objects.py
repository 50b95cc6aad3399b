"""Plain objects that travel: with every request goes the code of their classes, and dataclasses generate much of it."""


class Bundle:
    """Things that belong together: what its class annotates, given in that order or by name, else as it has them."""

    def __init__(self, *given, **named):
        vars(self).update(zip(self.__annotations__, given, strict=False), **named)


class Label(Bundle):
    """A name of something: equal where its kind and its numbers are, and a key of dicts."""

    def __eq__(self, other):
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self):
        return hash((type(self), *vars(self).values()))
