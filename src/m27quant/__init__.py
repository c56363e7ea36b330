"""MiniMax-M2.x to NVFP4: quantize, verify and run."""

__version__ = "0.1.0"
