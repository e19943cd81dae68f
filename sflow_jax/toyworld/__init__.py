"""The embedded toy world: drawn scenes whose edits have a known right answer."""
