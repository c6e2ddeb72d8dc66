"""The plan inside a trainer: read `callback.py` first."""
