"""`python -m selfrepair_nn` and the `selfrepair` command."""

import sys


def main() -> None:
    """The command; an interrupt while it is still loading is a line, too."""
    try:
        from selfrepair_nn.cli import main as command
    except KeyboardInterrupt:
        exec("")  # or Python may end as if killed: see `ending.interrupted`, which may not be there yet
        sys.stderr.write("selfrepair: interrupted\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
