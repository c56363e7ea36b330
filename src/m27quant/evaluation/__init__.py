"""How far quantized checkpoints are from the model that they were made from, measured on text, with intervals and tests."""
