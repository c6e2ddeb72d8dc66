"""Cases for several processes, which torchrun starts; tests/scoring/test_distributed.py checks the results."""
