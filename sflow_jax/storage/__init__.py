"""Storage: converted checkpoints, where weights live, results on disk."""
