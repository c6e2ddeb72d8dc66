"""The laboratory: does the filter find planted noise, and do models trained on what it keeps solve more problems?

All text comes from seeded generators in this folder, every token carries its true kind, and every number in
docs/evidence.md is printed by `make proof`.
"""
