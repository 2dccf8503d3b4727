"""Headless scripts that make, measure and export models. Each reads top to bottom and runs with `python -m`."""

import LDRCore  # noqa: F401  before torch, whose threads it teaches not to hold a core while they wait
from Training.missing_simpleitk import stand_in

stand_in()
