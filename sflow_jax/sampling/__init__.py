"""Sampling: interventions by step, schedules, solvers, guidance, and the compiled step."""
