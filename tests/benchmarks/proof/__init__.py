"""The laboratory: does the filter find noise with real models, and do models get better? Begin with `__main__.py`."""
