"""What a run is doing, and how far it is: one line on a terminal or in a notebook, drawn at most twice a second."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm.auto import tqdm

from selfrepair_nn.shown import LOG, line


class Bar:
    """A run's progress: first what is being loaded and looked at, then head x token pairs, with rate and time left."""

    def __init__(self, name: str, progress: bool | None) -> None:
        """`progress` None shows it where somebody looks: on a terminal, or in a notebook.

        Where it is not shown, libraries show none either while it is open.
        """
        shown = progress if progress is not None else LOG.isEnabledFor(logging.WARNING) and watched()
        self.name = line(name, 60)
        self._within = ExitStack()
        self._bar: Any = tqdm(
            unit=" head·tokens",
            unit_scale=True,
            mininterval=0.5,
            file=sys.stderr,
            disable=not shown,
            leave=False,
            bar_format="{desc} [{elapsed}{postfix}]",
        )

    def __enter__(self) -> "Bar":
        if self._bar.disable:
            self._within.enter_context(without_bars())
        return self

    def __exit__(self, *_: object) -> None:
        self._within.close()
        self._bar.close()

    def stage(self, doing: str) -> None:
        """Say what is being done before anything is computed."""
        LOG.info("%s: %s", self.name, doing)
        self._bar.set_description_str(f"{self.name}: {doing}")

    def begin(self, total: int | None, done: int) -> None:
        """Count from here on: so many of a total are done already; None where the total is not known."""
        if self._bar.disable:
            return
        self._bar.bar_format, self._bar.leave = None, True
        self._bar.reset(total)
        self._bar.initial = self._bar.n = done
        self._bar.set_description_str(self.name, refresh=False)
        self._bar.refresh()

    def update(self, tokens: int) -> None:
        self._bar.update(tokens)

    def note(self, state: str) -> None:
        """What stands behind the numbers: the jobs on a server, for one."""
        self._bar.set_postfix_str(line(state, 60))


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers and the hub's client show no bars of their own, such as that of the weights being read."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as library

    shown, of_hub = library.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()  # both, as it disabled both
            if not of_hub:
                disable_progress_bars()


def watched() -> bool:
    """Whether what is written to stderr is seen as it comes: by a terminal, or a notebook."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())
