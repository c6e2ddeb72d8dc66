"""The examples of docs/which-tokens.md: own texts from math, code and medicine, and a base trained on such text.

See `__main__.py`.
"""
