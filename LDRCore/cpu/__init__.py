"""Deployment: layouts for inference on a CPU, precision, memory. Never part of a module that trains."""
