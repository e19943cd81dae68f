"""Which layers are vital: the sweep, its scores, and the report."""
