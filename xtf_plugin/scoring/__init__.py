"""The scoring pass: read `engine.py` first, then `reference.py`; `cached_scores.py` stores its results."""
