"""Made with the code of commit 87a8735 (version 0.1.0): `python make.py` in an empty folder, PYTHONPATH at that checkout."""

import json
from pathlib import Path

import torch

from nha_megatron.config import parse_config
from nha_megatron.hf.export import export_to_hf
from nha_megatron.hf.modeling_nha import NHAForCausalLM
from nha_megatron.training.run import pretrain
from tests.training.small_run import settings, write_corpus

folder = Path(".")
write_corpus(folder)
plain = settings(
    folder,
    model={"window": "4,full", "qk_norm": "rms", "qkv_bias": True, "hidden_size": 16, "ffn_hidden_size": 32},
    data={"packing": "concat"},
    training={"validate_every": 3},
    logging={"layer_statistics": 3},
    checkpoint={"keep": 2},
)
pretrain(parse_config(plain))
export_to_hf("run/checkpoints/step_6", "exported", with_tokenizer=False)
tokens = torch.arange(24).view(2, 12) * 7 % 97
model = NHAForCausalLM.from_pretrained("exported").eval()
with torch.no_grad():
    logits = model(tokens).logits
Path("expected.json").write_text(
    json.dumps(
        {
            "tokens": tokens.tolist(),
            "logits_sums": logits.double().sum(-1).tolist(),
            "logits_squares": logits.double().square().sum(-1).tolist(),
        }
    )
)
