"""What the blocks of a local learner keep of a batch, change, and learn from each other."""

from plywise.testing.contract.test_learner_blocks import *
