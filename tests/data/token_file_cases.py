"""Small token files for tests: documents whose tokens say where they come from."""

from pathlib import Path

import numpy as np

from nha_megatron.config import RunConfig, parse_config
from nha_megatron.data.token_files import TokenFileWriter

END_OF_TEXT = 0


def write_token_file(
    prefix: Path,
    documents: list[list[int]],
    vocab_size: int = 60000,
    tokenizer_sha256: str = "a" * 64,
    max_sequence_tokens: int = 2**31 - 1,
) -> None:
    """Write documents given without their end-of-text token."""
    with TokenFileWriter(
        prefix,
        vocab_size=vocab_size,
        end_of_text=END_OF_TEXT,
        tokenizer="a tokenizer",
        tokenizer_sha256=tokenizer_sha256,
        source="a test",
        max_sequence_tokens=max_sequence_tokens,
    ) as writer:
        for document in documents:
            writer.add_document(np.array([*document, END_OF_TEXT]))


def numbered_documents(lengths: list[int], first: int = 1) -> list[list[int]]:
    """Documents of these lengths; every token of the corpus is a different number, counting up from `first`."""
    ends = np.cumsum(lengths) + first
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


def run_config(path: object, *, sequence_length: int, micro: int = 1, batch: int = 1, packing: str = "none", **data: object) -> RunConfig:
    """A run configuration of which the tests of this folder use `data` and the batch sizes."""
    return parse_config(
        {
            "model": {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 60000},
            "data": {"path": path, "sequence_length": sequence_length, "packing": packing, **data},
            "training": {"steps": 1, "micro_batch_size": micro, "global_batch_size": batch},
            "optimizer": {"lr": 1e-3},
            "logging": {"directory": "unused"},
        }
    )
