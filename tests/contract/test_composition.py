"""Every rule with every optimizer trains; an interrupted run goes on bit for bit."""

from plywise.testing.contract.test_composition import *
