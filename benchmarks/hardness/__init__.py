"""Bad inputs of every kind, and what becomes of them: `python benchmarks/hardness.py`.

cases        what a case is, and the folder that it runs in
world        what cases share: a small model as published and converted, features, an inversion, a finished sweep
runner       one forked process a case, with bounds of time and memory
judge        what counts as handled well
documents    JSON files changed in many ways
conversions  what cases of conversions share
profiles     colour profiles, and right colours without a colour library

The cases: settings, pictures, sources, weights, layouts, tokenizers, checkpoints, runs, places.
"""
