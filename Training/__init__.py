"""Headless scripts that make, measure and export models. Each reads top to bottom and runs with `python -m`."""
