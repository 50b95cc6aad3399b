"""A real NDIF server for tests and for anybody's own use: `python -m tests.ndif_server`."""

from .environment import INSTALL, Unavailable, install, missing
from .server import MODES, PARTS, SERVICES, Ndif

__all__ = ["INSTALL", "MODES", "PARTS", "SERVICES", "Ndif", "Unavailable", "install", "missing"]
