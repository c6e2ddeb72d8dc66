"""Scores on disk, found by content: read `store.py` first."""
