"""Editing: methods by name, their paths as steps, regions, choosing among candidates."""
