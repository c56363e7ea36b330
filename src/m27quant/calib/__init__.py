"""Calibration: text to tokens, tokens through the layers, and the ranges seen on the way."""
