"""Readers of training data, and the random views that networks are trained on."""
