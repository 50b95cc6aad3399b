"""From units of work to a finished store: opened, filled, interrupted, resumed, mended."""
