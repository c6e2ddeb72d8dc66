"""From scores to a keep flag and a reason for every token: read `select.py` first, then `rules.py`."""
