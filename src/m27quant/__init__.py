"""MiniMax-M2.x to NVFP4: quantize, verify and run."""
