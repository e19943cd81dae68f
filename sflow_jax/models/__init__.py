"""The networks: pure functions of their parameters, no input or output, no sampling."""
