"""Arithmetic without torch about a run: parameters, FLOPs, memory, traffic, time."""
