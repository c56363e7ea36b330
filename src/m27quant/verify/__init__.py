"""Proving a checkpoint right for the engines that will load it."""
