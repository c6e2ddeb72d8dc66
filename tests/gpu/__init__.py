"""Everything that only a GPU can tell, in one command: `make gpu`. Read `__main__.py` first.

`parts.py` says what runs; `kit.py` packs all of it for a machine without a network, and `start.py` runs it there.
"""
