"""Drafters are trained, evaluated and counted here."""
