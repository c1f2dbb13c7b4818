"""The command ``plywise``, also as ``python -m plywise`` for what starts modules, such as torchrun."""

import os
import sys

# Python puts the current directory first: a file of the user's called like a package would be imported in
# its place. It comes last, as for the command plywise; `plywise._util.import_path.load` finds modules there.
if sys.path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))

from plywise._util.process_groups import end_with_torchrun


def main() -> None:
    """Import the command line, which takes a moment in which Ctrl-C may come, and run a command."""
    end_with_torchrun()  # before the imports, which take seconds
    try:
        from plywise.cli import main as run
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing was changed.", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
