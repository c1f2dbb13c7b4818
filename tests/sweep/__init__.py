"""Every module that torch's own tests know, between two linear layers, under every rule (promises 12 and 13).

``python -m pytest tests/sweep`` runs one input of each module; ``python -m tests.sweep.run`` runs them all.
"""

import sys
from pathlib import Path

# pytest puts tests/ on the path itself; `python -m tests.sweep.run` and its processes do not
_TESTS = str(Path(__file__).parents[1])
if _TESTS not in sys.path:
    sys.path.insert(1, _TESTS)
