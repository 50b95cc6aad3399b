"""A server of your own: `python -m tests.ndif_server up MODEL …`, until Ctrl-C."""

import contextlib
import signal
from pathlib import Path

import click

from .environment import Unavailable, install
from .server import MODES, Ndif


@click.group()
def main() -> None:
    """NDIF's published server on this machine's CPU (docs/server.md)."""


@main.command("install")
def install_command() -> None:
    """Make ready what the server needs: redis-server, and its environment in .cache (about 1.7 GB)."""
    with _explained():
        install()
    click.echo("ready")


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]DIRECTORY …")
@click.option("--mode", type=click.Choice(list(MODES)), default="trusted", show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="What the models compute in.")
@click.option("--time-limit", type=float, help="Seconds after which a request is ended.  [default: none]")
def up(models: tuple[str, ...], mode: str, dtype: str, time_limit: float | None) -> None:
    """Serve models (embedded names, or directories as save_pretrained writes them) until Ctrl-C.

    A model is known to clients as NAME, by default local/DIRECTORY. Settings for clients are printed.
    """
    served = dict(_named(model) for model in models)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    with (
        _explained(),
        contextlib.suppress(KeyboardInterrupt),
        Ndif(served, mode, dtype, time_limit) as server,
    ):
        for key, value in server.env.items():
            click.echo(f"export {key}={value}")
        click.echo(f"up after {server.seconds:.0f} s, serving {', '.join(served)}; Ctrl-C ends it", err=True)
        signal.pause()


def _named(model: str) -> tuple[str, Path]:
    """Hub name and directory of what the command line calls a model."""
    from selfrepair_nn.models.load import find

    name, _, directory = model.rpartition("=")
    with _explained():
        path = Path(find(directory).location)
    return name or f"local/{path.name}", path


@contextlib.contextmanager
def _explained():
    from selfrepair_nn.errors import SelfRepairError

    try:
        yield
    except (Unavailable, RuntimeError, SelfRepairError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
