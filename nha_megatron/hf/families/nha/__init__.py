"""This project's own family: what `nha-megatron export` writes."""
