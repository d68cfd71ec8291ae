"""Distils large transformer language models into small ones, in JAX."""

__version__ = "0.1.0"
