"""Exact context parallelism for slots and window: the plan (pure), the messages, the exchange."""
