"""The tests that are the contract; `plywise.testing.check_rule` and `check_learner` run them."""
