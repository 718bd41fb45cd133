"""A model built from a configuration and trained for a few steps on random tokens: python examples/build_model.py [CONFIG.yaml]

On one process it is the whole model. Under torchrun every rank builds its part: torchrun --nproc-per-node=2 examples/build_model.py
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from nha_megatron import load_config
from nha_megatron.data.batch import make_batch
from nha_megatron.engine.create import create_engine
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import create_layout

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main(path: str) -> None:
    config = load_config(path, [f"parallel.context={os.environ.get('WORLD_SIZE', 1)}"])
    device = choose_device(config.training.device)
    layout = create_layout(config, device)  # joins the ranks, or is one by itself
    engine = create_engine(config, device, layout)

    samples = np.random.default_rng(0).integers(1, 100, (config.training.micro_batch_size, config.data.sequence_length + 1))
    batch = make_batch(samples, end_of_text=0, isolate_documents=False, cp_rank=layout.cp_rank, cp_size=layout.cp_size)
    for _ in range(5):
        result = engine.train_step([batch], lr=1e-3)
        if layout.rank == 0:
            print(f"{layout.describe()}: loss {result.loss:.4f}, gradient {result.grad_norm:.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(QUICKSTART))
