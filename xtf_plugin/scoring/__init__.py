"""From documents to what a reference says of them: read `engine.py` first, then `reference.py`."""
