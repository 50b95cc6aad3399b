"""`python -m selfrepair_nn` and the `selfrepair` command."""

from selfrepair_nn.cli import main

if __name__ == "__main__":
    main()
