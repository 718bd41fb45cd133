"""A run started from Python, and its export: python examples/train.py FOLDER

Everything is made in FOLDER: a corpus of numbers that count upwards, the run, and the exported model. Started again it continues.
"""

import sys
from pathlib import Path

import numpy as np

from nha_megatron import export_to_hf, parse_config, pretrain
from nha_megatron.data import TokenFileWriter
from nha_megatron.training.metrics import read_metrics

VOCABULARY, END_OF_TEXT = 64, 0


def write_corpus(prefix: Path) -> None:
    """What `nha-megatron prepare` does with text: documents of tokens, each ended by end-of-text."""
    facts = {"tokenizer": "none", "tokenizer_sha256": "0" * 64, "source": "examples/train.py"}
    with TokenFileWriter(prefix, vocab_size=VOCABULARY, end_of_text=END_OF_TEXT, **facts) as writer:
        for start in range(100):
            writer.add_document(np.append(1 + (start + np.arange(100)) % (VOCABULARY - 1), END_OF_TEXT))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.json").exists():
        write_corpus(folder / "train")
    config = parse_config(
        {
            "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "window": 8,
                      "num_slots": 8, "vocab_size": VOCABULARY},
            "data": {"path": str(folder / "train"), "sequence_length": 64},
            "training": {"steps": 60, "micro_batch_size": 4, "global_batch_size": 4},
            "optimizer": {"lr": 1e-2, "warmup_steps": 2},
            "logging": {"directory": str(folder / "run"), "every": 20, "tensorboard": False},
        }
    )  # fmt: skip
    pretrain(config)
    losses = [record["loss"] for record in read_metrics(folder / "run" / "metrics.jsonl")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    checkpoint = export_to_hf(folder / "run", folder / "exported", with_tokenizer=False, overwrite=True)
    print(f"{checkpoint} -> {folder / 'exported'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/train.py FOLDER")
    main(Path(sys.argv[1]))
