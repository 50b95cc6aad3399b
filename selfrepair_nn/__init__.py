"""If a part of a language model is ablated: what is lost, who makes up for it, and how.

import selfrepair_nn as sr

dataset = sr.run("heads", model="tiny-neox")       # or any supported Hugging Face model
print(sr.summary(dataset))
sr.plot(dataset, "outputs/figures")
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PLACES = {
    "run": "execution.run",
    "preview": "execution.preview",
    "load": "models.load",
    "wrap": "models.load",
    "check": "models.check",
    "open_store": "store",
    "Graph": "graph",
    "sweep": "graph",
    "Head": "components",
    "Mlp": "components",
    "select_heads": "components",
    "Options": "options",
    "recipes": "recipe",
    "top_share": "analysis",
    "by_head": "analysis",
    "by_layer": "analysis",
    "summary": "analysis",
    "plot": "figures",
    "report": "report",
    "simulate": "simulate",
}
__all__ = sorted(_PLACES)

try:
    __version__ = version("selfrepair_nn")
except PackageNotFoundError:
    __version__ = "0"


def __getattr__(name: str) -> Any:
    """Public names load their room when they are first used: importing the package stays fast."""
    if name not in _PLACES:
        raise AttributeError(f"selfrepair_nn has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"selfrepair_nn.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
