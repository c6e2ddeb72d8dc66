"""The `xtf:` block: read `block.py` first, then `scores.py`."""
