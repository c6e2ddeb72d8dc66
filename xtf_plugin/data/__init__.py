"""Documents, their tokens and text: read `documents.py` first."""
