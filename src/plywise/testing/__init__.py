"""The contract of rules and learners: tests for those that you write yourself.

plywise makes many promises about its rules and local learners: a NaN never enters the weights, a step that
did not happen leaves no trace, a resumed run is bit-equal. Each promise is a test. `check_rule` and
`check_learner` run these tests on a rule or a learner of yours. They need pytest and hypothesis: ``pip
install 'plywise[testing]'``.
"""

from plywise.testing.cases import Case, LearnerCase
from plywise.testing.check import ContractResult, check_learner, check_rule, list_promises

__all__ = ["Case", "ContractResult", "LearnerCase", "check_learner", "check_rule", "list_promises"]
