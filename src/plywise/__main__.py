"""``python -m plywise``: the command line, for whoever starts modules, such as torchrun."""

from plywise.cli import main

if __name__ == "__main__":
    main()
