"""Families of models: one file says all that makes one different."""
