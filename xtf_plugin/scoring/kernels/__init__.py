"""Attention and LM-head statistics: read the definitions in `eager.py` first, then `dispatch.py`."""
