"""The definitions, in `eager.py`, and their optimised implementations, in `dispatch.py`. Read them in that order."""
