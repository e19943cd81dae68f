"""Evaluation of edits: known answers, PIE-Bench's layout, the paper's COCO protocol."""
