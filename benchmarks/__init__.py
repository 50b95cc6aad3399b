"""Speed and memory of the engine against named baselines, as ratios in one run: `python -m benchmarks`."""
