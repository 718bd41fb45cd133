"""Native Hybrid Attention: slots and a window under one softmax."""
