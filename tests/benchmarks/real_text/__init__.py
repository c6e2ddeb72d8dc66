"""The benchmark on real text: what the filter drops from public fine-tuning sets, and what that does to a tiny model.

Planted noise (tests/benchmarks/proof) has a known truth; real text has none, so that here one reads what was dropped.
"""
