"""Measures of a registration, and pairs of files scored by them."""
