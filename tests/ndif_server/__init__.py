"""A real NDIF server for tests and for anybody's own use: `python -m tests.ndif_server`."""

from .environment import Unavailable, install, missing
from .server import MODES, PARTS, SERVICES, Ndif

__all__ = ["MODES", "PARTS", "SERVICES", "Ndif", "Unavailable", "install", "missing"]
