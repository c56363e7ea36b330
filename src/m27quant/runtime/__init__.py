"""The model: one definition of the decoder layer, for calibration and for inference."""
