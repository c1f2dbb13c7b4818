"""Promises that do not hold yet: strict expected failures, so that a repair cannot go unnoticed.

Each entry is a regular expression of test ids, after ``tests/contract/test_``, e.g.
``r"scales\\.py::test_every_solve_ends\\[nlms-zeros-\\w+\\]"``, and the reason. Delete the entry together
with the bug.
"""

KNOWN_BUGS: list[tuple[str, str]] = []
