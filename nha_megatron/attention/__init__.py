"""Attention layers for a Megatron-core transformer, and their context parallelism. Knows nothing of training."""
