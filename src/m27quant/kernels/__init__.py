"""The arithmetic of the house, one folder per operation.

In each folder `reference.py` is the specification in plain torch, `cpu.py` (compiled) and `gpu.py` (Triton)
give the same bytes faster, and `__init__.py` picks one through `dispatch.choose`.
"""
