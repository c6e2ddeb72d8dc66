"""Tests of the Triton kernels that run in Triton's interpreter, without a GPU.

TRITON_INTERPRET=1 selects the interpreter before Triton is first imported, for all packages in the process. So
`tests/scoring/test_triton_kernels.py` runs this folder in its own process. By hand:
`TRITON_INTERPRET=1 python -m pytest tests/interpreted`.
"""
