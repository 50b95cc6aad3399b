"""Dataclasses that travel: what a dataclass generates is sent with every request, so only what is used is generated."""

from dataclasses import dataclass
from functools import partial

bundle = partial(dataclass, repr=False, eq=False, match_args=False)
"""Things that belong together."""

label = partial(dataclass, repr=False, unsafe_hash=True, match_args=False)
"""A name of something: equal where its numbers are, and a key of dicts."""
