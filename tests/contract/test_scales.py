"""Same seed, same bits; every solve ends: extreme scales, zeros, rank one, constant features."""

from plywise.testing.contract.test_scales import *
