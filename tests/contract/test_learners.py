"""What every local learner promises: it learns, same bits, resume, clear refusals, no trace."""

from plywise.testing.contract.test_learners import *
