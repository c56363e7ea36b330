"""How far quantized checkpoints are from what they were made of: measured on text, with intervals and tests."""
