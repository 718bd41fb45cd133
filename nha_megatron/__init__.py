"""Distributed pretraining of Native Hybrid Attention language models on Megatron-core."""

__version__ = "0.1.0"
