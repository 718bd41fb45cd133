"""A small valid configuration that the tests vary."""

from typing import Any

from nha_megatron.config import ModelConfig, RunConfig, parse_config

BASE = """\
model:
  num_layers: 4
  hidden_size: 64
  ffn_hidden_size: 128
  num_heads: 4
  num_kv_heads: 2
  num_slots: 8
  window: 16
  vocab_size: 256
data:
  path: data/train
  sequence_length: 128
training:
  steps: 10
  micro_batch_size: 2
  global_batch_size: 8
optimizer:
  lr: 1.0e-3
logging:
  directory: runs/test
"""


def model(**changes: Any) -> ModelConfig:
    """A model section with some fields changed."""
    fields = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_slots": 8,
        "window": 16,
        "vocab_size": 256,
    }
    return ModelConfig(**{**fields, **changes})


def run(**sections: dict[str, Any]) -> RunConfig:
    """A run with some fields changed: run(model={"window": 8}, parallel={"tensor": 2})."""
    data: dict[str, dict[str, Any]] = {
        "model": model().model_dump(),
        "parallel": {},
        "data": {"path": "data/train", "sequence_length": 128},
        "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {},
        "logging": {"directory": "runs/test"},
    }
    return parse_config({name: {**fields, **sections.get(name, {})} for name, fields in data.items()})
