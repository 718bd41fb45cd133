"""Hugging Face format: model, configuration, export of checkpoints and import of exported directories."""
