"""The training loop and what surrounds it: schedule, metrics, guards, signals."""
