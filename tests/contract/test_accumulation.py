"""Micro-batches add up; the loss's scale goes through; GradScaler."""

from plywise.testing.contract.test_accumulation import *
