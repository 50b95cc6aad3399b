"""A run that stands still once it has stored some blocks, until it may go on: what is done to it meanwhile hits it.

`python standing.py BLOCKS GO ARGUMENTS` is `python -m selfrepair_nn ARGUMENTS`, which stands still so.
"""

import runpy
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

from selfrepair_nn.running import workers
from selfrepair_nn.store import Store

BLOCKS = 3
"""So many it stores at most, where a few are enough: whoever waits for the first meets it at work, or standing."""

STANDING = [sys.executable, __file__, str(BLOCKS)]
"""The command that does."""

begin_worker = workers._begin


def stand(blocks: int, go: Path) -> None:
    """From now on this process, and each worker that it starts, stores so many blocks and no more until `go` exists."""
    write, stored = Store.write_prompts, count()

    def writing(*given: object) -> None:
        while next(stored) >= blocks and not go.exists():
            time.sleep(0.02)
        write(*given)

    Store.write_prompts = writing
    workers._begin = partial(_begin, blocks, go)


def _begin(blocks: int, go: Path) -> None:
    """What a worker begins with."""
    stand(blocks, go)
    begin_worker()


def main() -> None:
    stand(int(sys.argv[1]), Path(sys.argv[2]))
    del sys.argv[1:3]
    runpy.run_module("selfrepair_nn", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from standing import main as importable  # by its name, workers find what they begin with

    importable()
