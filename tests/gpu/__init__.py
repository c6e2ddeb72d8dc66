"""All checks and measurements that need a GPU, in one command: `make gpu`. Read `__main__.py` first.

`parts.py` says what runs; `kit.py` packs it for a machine without a network, and `start.py` runs it there.
"""
