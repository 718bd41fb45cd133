"""How many logits the loss holds at once."""

# fp32 logits that the loss holds at once. Large enough that the products of a chunk keep a GPU busy and that adding the chunk's part to
# the gradient of the output matrix is a small part of the work; small beside the rest of a rank's memory, whatever the sequence length.
LOGITS_BYTES = 256 * 2**20


def logit_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits over `vocabulary` columns (of one tensor rank) the loss holds at once: a multiple of 128, for full tiles."""
    return max(1, LOGITS_BYTES // (4 * vocabulary * 128)) * 128
