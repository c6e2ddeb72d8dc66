"""Applies a plan in a trainer; read `callback.py` first."""
