"""Attention layers: one folder a kind. `kind.py` says what the rest of the system asks of a kind."""
