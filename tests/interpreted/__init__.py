"""Tests of the Triton kernels that run in Triton's interpreter, without a GPU.

The interpreter is chosen by TRITON_INTERPRET=1 before Triton is first imported, and then takes Triton's kernels away
from every other package in the process. So `tests/scoring/test_triton_kernels.py` runs this folder in a process of its own;
by hand: `TRITON_INTERPRET=1 python -m pytest tests/interpreted`.
"""
