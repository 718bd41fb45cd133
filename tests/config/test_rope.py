"""Inverse frequencies against Hugging Face transformers, which pretrained checkpoints are written for."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nha_megatron.config.rope import inverse_frequencies, rope_problems
from tests.config.cases import model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "high_freq_factor": 8.0},
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 1.25},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        {**YARN, "factor": 40, "original_max_position_embeddings": 4096},
    ],
    ids=lambda scaling: ",".join(f"{key}={value}" for key, value in scaling.items() if key != "original_max_position_embeddings"),
)
def test_scaled_frequencies_are_those_of_transformers(scaling, partial, head_dim):
    theta = 500000.0
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": theta, "partial_rotary_factor": partial},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))

    ours = model(hidden_size=4 * head_dim, rope_theta=theta, rope_scaling=scaling, partial_rotary_factor=partial)
    frequencies, factor = ours.rope()

    assert frequencies.dtype == torch.float64 and frequencies.shape == (int(head_dim * partial) // 2,)
    # transformers computes in fp32: a few roundings of 6e-8 each, the largest in the power.
    torch.testing.assert_close(frequencies.float(), expected, rtol=2e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_plain_frequencies_are_powers_of_theta():
    frequencies, factor = model(hidden_size=32, rope_theta=10000.0).rope()  # 8 channels a head
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64), rtol=1e-14, atol=0)
    assert factor == 1.0
    assert inverse_frequencies(8, 10000.0, {"rope_type": "default"}) == inverse_frequencies(8, 10000.0, None)


def test_the_older_spelling_of_the_type_is_read():
    older = {"type": "linear", "factor": 2.0}
    assert not rope_problems(older, 1e4, 8)
    assert inverse_frequencies(8, 1e4, older) == inverse_frequencies(8, 1e4, {"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "frequencies change with the length"),
        ({"rope_type": "longrope", "factor": 2.0}, "depend on the length"),
        ({"rope_type": "ntk"}, "'ntk' is unknown; allowed: default, linear, llama3, yarn"),
        ({"rope_type": "linear"}, "needs 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
        ({"rope_type": "linear", "factor": float("nan")}, "finite number"),
        ({"rope_type": "linear", "factor": True}, "finite number"),
        ({"rope_type": "linear", "factor": "2"}, "finite number"),
        ({"rope_type": "linear", "factor": None}, "finite number"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "no key 'beta_fast'; allowed: factor"),
        ({"factor": 2.0}, "type 'default' has no key 'factor'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor greater than low_freq_factor"),
        ({**YARN, "truncate": 1}, "must be true or false"),
    ],
)
def test_a_scaling_that_cannot_be_used_is_refused(scaling, message):
    problems = rope_problems(scaling, 10000.0, 64)
    assert len(problems) == 1 and message in problems[0]
