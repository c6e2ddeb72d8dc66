"""Stock commands of TRL and Axolotl: read `boot.py` first, then `trl.py`."""
