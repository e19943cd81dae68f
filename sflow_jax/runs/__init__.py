"""Runs: folders that resume and are shared."""
