"""Speculative decoding: drafters propose tokens, one forward pass of the target accepts some of them."""
