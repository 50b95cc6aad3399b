"""Signals that end a run: by hand, by a scheduler, by a terminal that was closed."""

import signal

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
