"""Measures, and pairs scored by them."""
