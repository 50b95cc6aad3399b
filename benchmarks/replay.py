"""`python -m benchmarks.replay STORE`: what --until-ci would have done with a whole run's prompts, over and over.

The prompts of a finished run are taken for all the text there is. Runs as long as it, and four times as long, are drawn
from them with replacement; rounds and intervals are the run's own. Printed are how many ablated head-tokens are saved
against a whole run of that length, and how often the intervals cover what is then the truth.
"""

import argparse
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

import selfrepair_nn as sr
from selfrepair_nn.confidence import Tally
from selfrepair_nn.layout.plan import default_block
from selfrepair_nn.running.rounds import schedule

GOALS = (None, 0.1, 0.05, 0.03)
"""Half-widths in logits; None: the widest that the whole run itself reaches."""
LONGER = (1, 4)


@dataclass(frozen=True)
class Population:
    """Of every head and prompt: summed self-repair of its top tokens, their number, and tokens to ablate for them."""

    sums: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    layer: np.ndarray
    positions: int

    @classmethod
    def of(cls, ds: xr.Dataset) -> "Population":
        """From a store, of the prompts that are done for all of its heads."""
        ds = ds.isel(prompt=np.flatnonzero(ds.done.all(("layer", "head"))))
        top, positions = sr.top_share(ds).values, ds.sizes["position"]
        last = np.where(top, np.arange(1, positions + 1), 0).max(-1)
        found = np.where(top, ds.self_repair.values, 0).sum(-1), top.sum(-1), last
        heads = [each.reshape(-1, each.shape[-1]).astype(float) for each in found]
        return cls(*heads, np.repeat(np.arange(ds.sizes["layer"]), ds.sizes["head"]), positions)

    def drawn(self, prompts: np.ndarray) -> Tally:
        """What a whole run of these prompts would know."""
        return Tally(self.sums[:, prompts], self.counts[:, prompts])

    @cached_property
    def whole(self) -> Tally:
        return self.drawn(np.arange(self.sums.shape[1]))

    def answers(self, tally: Tally, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Means and half-widths of the heads, or of the layers."""
        return (tally.mean, tally.half_width) if what == "heads" else tally.of_groups(self.layer)


def stopped(text: Population, prompts: np.ndarray, goal: float, what: str) -> tuple[Tally, float]:
    """What a run of these prompts knows when it stops, and the tokens that it ablates."""
    tally, tokens = Tally.empty(len(text.layer), np.arange(len(prompts))), 0.0
    open_, block = np.ones(len(text.layer), bool), default_block(text.positions + 1)
    for blocks in schedule([slice(i, i + block) for i in range(0, len(prompts), block)]):
        here = np.arange(blocks[0].start, min(blocks[-1].stop, len(prompts)))
        where = np.ix_(open_, here)
        tally.sums[where] = text.sums[np.ix_(open_, prompts[here])]
        tally.counts[where] = text.counts[np.ix_(open_, prompts[here])]
        tokens += text.tokens[np.ix_(open_, prompts[here])].sum()
        wide = text.answers(tally, what)[1] > goal
        open_ &= wide if what == "heads" else wide[text.layer]
        if not open_.any():
            break
    return tally, tokens


def replay(text: Population, length: int, goal: float | None, what: str, times: int) -> str:
    """One line of the table."""
    rng, truth = np.random.default_rng(0), text.answers(text.whole, what)[0]
    goals, saved, covered = [], [], []
    for _ in range(times):
        prompts = rng.integers(0, text.sums.shape[1], length)
        widths = text.answers(text.drawn(prompts), what)[1]
        goals.append(goal or widths[np.isfinite(widths)].max())
        tally, tokens = stopped(text, prompts, goals[-1], what)
        means, widths = text.answers(tally, what)
        saved.append(len(text.layer) * length * text.positions / tokens)
        covered.append(np.abs(means - truth) <= widths)
    share = np.mean(covered, axis=0)
    return (
        f"{length * (text.positions + 1):>9,} tokens, {what} to {np.mean(goals):.3f}{'' if goal else ' (whole run)'}: "
        f"{np.mean(saved):.1f} times fewer, covered {share.mean():.1%} (least {share.min():.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--times", type=int, default=200)
    asked = parser.parse_args()
    text = Population.of(sr.open_store(asked.store).load())
    n = text.sums.shape[1]
    print(
        f"{n} prompts; the top share alone: {text.sums.size * text.positions / text.tokens.sum():.2f} times fewer"
    )
    for what in ("layers", "heads"):
        for goal in GOALS:
            for longer in LONGER:
                print(replay(text, longer * n, goal, what, asked.times), flush=True)


if __name__ == "__main__":
    main()
