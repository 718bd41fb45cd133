"""The Hugging Face model computes what Megatron's GPTModel computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.hf.export import export_to_hf
from nha_megatron.hf.families.nha.modeling_nha import NHAForCausalLM
from tests.distributed import RankPool
from tests.hf.hf_cases import VARIANTS, hf_model, random_tokens, random_weights, tiny_model

LAYERS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "all_full": {"window": "full"},
    "all_slots": {"window": 0},
    "wide_window": {"window": 40},
    "full_weight": {"window": "full", "empty_slots": "weight", "value_activation": "none", "output_norm": "none"},
    "slots_mask": {"window": "0,3,1", "empty_slots": "mask"},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "window": "full"},
    "llama3_rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "window": "full",
    },
}


@pytest.mark.parametrize("variant", LAYERS)
def test_logits_equal_those_of_the_gpt_model(variant: str, ranks: RankPool) -> None:
    model = tiny_model(**LAYERS[variant])
    tokens = random_tokens(2, 32)
    (expected,) = ranks.run(1, "tests.hf.programs:gpt_logits", model=model, tokens=tokens, weights=random_weights(model))
    with torch.no_grad():
        logits = hf_model(model)(tokens).logits
    # Logits of order 1 to 6 in float32: separate instead of fused projections change the order of sums only (7e-6 at most when measured).
    torch.testing.assert_close(logits, expected[..., : model.vocab_size], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_of_a_tensor_and_pipeline_parallel_checkpoint(tied: bool, ranks: RankPool, tmp_path: Path) -> None:
    model = tiny_model(num_layers=4, window="4,full", tie_embeddings=tied, qk_norm="rms", init_std=0.3)
    ranks.run(
        4, "tests.hf.programs:save_new_run", model=model, root=tmp_path / "run" / "checkpoints", parallel={"tensor": 2, "pipeline": 2}
    )
    tokens = random_tokens(2, 32)
    # Initial weights do not depend on the layout, so one rank has the weights that four ranks saved.
    (expected,) = ranks.run(1, "tests.hf.programs:gpt_logits", model=model, tokens=tokens)
    export_to_hf(tmp_path / "run", tmp_path / "hf")
    exported = NHAForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = exported(tokens).logits
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits, expected[..., : model.vocab_size], atol=5e-5, rtol=1e-5)
