"""Imports published checkpoints into the layout of `sflow_jax.storage.checkpoint`."""
