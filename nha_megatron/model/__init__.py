"""Run configuration -> Megatron layer specs -> GPTModel, its initial weights and its loss."""
