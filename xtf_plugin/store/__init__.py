"""The score cache on disk: read `store.py` first."""
