"""Tiny families of models, by where their modules come from; `FAMILIES` is all of them."""

from coverage_families.family import Family
from coverage_families.packages import PACKAGES
from coverage_families.senses import SENSES
from coverage_families.standard import STANDARD
from coverage_families.text import TEXT
from coverage_families.unusual import UNUSUAL

__all__ = ["FAMILIES", "Family"]

FAMILIES: tuple[Family, ...] = (*STANDARD, *UNUSUAL, *TEXT, *SENSES, *PACKAGES)
