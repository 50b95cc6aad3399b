"""If a part of a language model is ablated: what is lost, who makes up for it, and how.

import selfrepair_nn as sr

dataset = sr.run("heads", model="tiny-neox")       # or any supported Hugging Face model
print(sr.summary(dataset))
sr.plot(dataset, "outputs/figures")
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_PLACES = {
    each.asname or each.name: (line.module or __name__, each.name)
    for line in _STUB.body
    if isinstance(line, ast.ImportFrom)
    for each in line.names
}
"""Where each public name is: the stub, which is what checkers and editors read, says it for all."""

_ROOMS = {name for name, (room, _) in _PLACES.items() if room == __name__}
__all__ = sorted(_PLACES.keys() - _ROOMS)


def __getattr__(name: str) -> Any:
    """Public names load their room when they are first used: importing the package stays fast."""
    if name == "__version__":
        return _version()
    if name not in _PLACES:
        raise AttributeError(f"selfrepair_nn has no {name!r}; it offers {', '.join(__all__)}")
    room, found = _PLACES[name]
    if name in _ROOMS:
        return import_module(f"{room}.{found}")
    from selfrepair_nn.face import guarded

    made = getattr(import_module(room), found)
    globals()[name] = made if isinstance(made, type) else guarded(made)
    return globals()[name]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("selfrepair_nn")
    except PackageNotFoundError:
        return "0"


def __dir__() -> list[str]:
    return sorted([*_PLACES, "__version__"])
