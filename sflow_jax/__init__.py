"""Stable Flow in JAX."""
