"""Everything that knows another package's insides lives below here; nothing above imports a host at import time."""
