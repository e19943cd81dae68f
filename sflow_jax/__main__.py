"""`python -m sflow_jax` is `sflow`."""

from sflow_jax.commands.main import main

main()
