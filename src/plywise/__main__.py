"""``python -m plywise``: the command line, for programs that start modules, such as torchrun."""

import os
import sys

# Python puts the current directory first: a file of the user's called like a package would be imported in
# its place. It comes last, as for the command plywise; `plywise._util.import_path.load` finds modules there.
if sys.path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))

from plywise._util.process_groups import end_with_torchrun

if __name__ == "__main__":
    end_with_torchrun()  # before the imports, which take seconds

from plywise.cli import main

if __name__ == "__main__":
    main()
