"""What every local learner promises: same bits, resume, clear refusals, no trace, no leak."""

from plywise.testing.contract.test_learners import *
