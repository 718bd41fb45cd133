"""Packed documents and padding, as trainers mark them: each way gives what the documents give alone, or is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.hf_cases import hf_model, random_tokens, tiny_model

# Logits are of order 1 to 10, in float32.
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
COUNTING = torch.arange(8)[None]
BOUNDARIES = torch.tensor([0, 3, 8], dtype=torch.int32)
NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
ONES = torch.ones(1, 8, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return hf_model(tiny_model())


def alone(model: Any, tokens: Tensor, *documents: Any) -> Tensor:
    """Logits of one row's documents, each given without the others, one after the other."""
    return torch.cat([model(tokens[:, places], use_cache=False).logits for places in documents], dim=1)


@pytest.mark.parametrize(
    "markers",
    [
        {"position_ids": POSITIONS},
        {"position_ids": POSITIONS + 1},
        {"position_ids": POSITIONS, "attention_mask": ONES},
        {"position_ids": COUNTING, "cu_seq_lens_q": BOUNDARIES},
        # what DataCollatorWithFlattening sends, with all that it can return
        {"position_ids": POSITIONS, **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), BOUNDARIES), "max_length_q": 5, "seq_idx": NUMBERS},
        {"cu_seq_lens_k": BOUNDARIES},
        {"cu_seqlens": torch.tensor([0, 3, 3, 8, 8])},
        {"seq_idx": NUMBERS},
        {"attention_mask": NUMBERS + 1},
        {"attention_mask": (NUMBERS + 1).to(torch.uint8), "position_ids": COUNTING},
    ],
    ids=lambda markers: "-".join(markers),
)
def test_documents_in_one_row_equal_documents_alone(markers: dict[str, Any], model: Any) -> None:
    tokens = random_tokens(1, 8)
    wanted = alone(model, tokens, slice(0, 3), slice(3, 8))
    torch.testing.assert_close(model(tokens, **markers).logits, wanted, **TOLERANCE)
    loss = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(7), **markers).loss
    given = torch.nn.functional.cross_entropy(wanted[0, :-1], tokens[0, 1:], reduction="sum") / 7
    torch.testing.assert_close(loss, given, **TOLERANCE)


@pytest.mark.parametrize(
    "markers",
    [
        {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0], [1, 1, 1, 2, 2, 3, 3, 3]])},
        {
            "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]]),
            "position_ids": torch.tensor([[9, 0, 1, 7, 2, 0, 1, 1], [0, 1, 2, 0, 1, 0, 1, 2]]),
        },
        {
            "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]]),
            "seq_idx": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2, 2]]),
        },
    ],
    ids=lambda markers: "-".join(markers),
)
def test_documents_beside_padding(markers: dict[str, Any], model: Any) -> None:
    tokens = random_tokens(2, 8)
    logits = model(tokens, **markers).logits
    torch.testing.assert_close(logits[:1, [1, 2, 4, 5, 6]], alone(model, tokens[:1], [1, 2, 4], [5, 6]), **TOLERANCE)
    torch.testing.assert_close(logits[1:], alone(model, tokens[1:], slice(0, 3), slice(3, 5), slice(5, 8)), **TOLERANCE)


@pytest.mark.parametrize(
    ("markers", "message"),
    [
        ({"attention_mask": torch.where(NUMBERS == 0, 0.0, -torch.inf)}, "floating tensor"),
        ({"attention_mask": torch.zeros(1, 8)}, "floating tensor"),
        ({"attention_mask": -NUMBERS}, "has the value -1"),
        ({"attention_mask": 2 - NUMBERS}, "from left to right"),
        ({"seq_idx": 1 - NUMBERS}, "from left to right"),
        ({"seq_idx": NUMBERS[0]}, "one entry per token"),
        ({"position_ids": POSITIONS[0]}, "one entry per token"),
        ({"position_ids": torch.tensor([[0, 1, 2, 1, 2, 3, 4, 5]])}, "count up by one"),
        ({"cu_seqlens": torch.tensor([0, 3, 9])}, "rise from 0 to the 8 tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "must be integers"),
        ({"cu_seqlens": BOUNDARIES, "attention_mask": ONES.scatter(1, torch.tensor([[7]]), 0)}, "without padding"),
        ({"cu_seqlens": torch.tensor([0, 4, 8]), "seq_idx": NUMBERS}, "mark other documents"),
        ({"cu_seqlens": torch.tensor([0, 8]), "position_ids": POSITIONS}, "starts again where cu_seqlens marks no document"),
        ({"cu_seqlens": BOUNDARIES, "use_cache": True}, "cannot fill a cache"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(markers: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        model(random_tokens(1, 8), **markers)


@pytest.mark.parametrize(
    ("markers", "message"),
    [({"attention_mask": torch.full((1, 8), 2)}, "cannot continue a cache"), ({"position_ids": torch.arange(4)[None]}, "behind a cache")],
    ids=["numbers", "positions"],
)
def test_a_document_does_not_begin_behind_a_cache(markers: dict[str, Any], message: str, model: Any) -> None:
    tokens = random_tokens(1, 8)
    cache = model(tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        model(tokens[:, 4:], past_key_values=cache, **markers)


@pytest.mark.parametrize("base", [False, True])
def test_a_keyword_that_nothing_reads_is_refused(base: bool, model: Any) -> None:
    called = model.model if base else model
    with pytest.raises(TypeError, match="'position_idz': did you mean position_ids"):
        called(random_tokens(1, 8), position_idz=POSITIONS)
    with pytest.raises(TypeError, match=r"'pixels': allowed are .*seq_idx"):
        called(random_tokens(1, 8), pixels=POSITIONS)
    with pytest.raises(TypeError, match="token_type_ids"):
        called(random_tokens(1, 8), token_type_ids=NUMBERS)
    called(random_tokens(1, 8), token_type_ids=0 * NUMBERS, pixels=None)


def test_empty_batches(model: Any) -> None:
    mask = torch.ones(0, 8, dtype=torch.int64)
    assert model(random_tokens(0, 8), attention_mask=mask).logits.shape == (0, 8, 61)
    assert model(random_tokens(2, 0), use_cache=True).logits.shape == (2, 0, 61)


def test_gradient_penalty_through_the_model() -> None:
    """The derivative of a gradient's norm equals its finite difference."""
    model = hf_model(tiny_model()).double()
    embedded = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(embedded.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def penalty(x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits.square().sum(), x, create_graph=True)
        return gradient.square().sum()

    with torch.enable_grad():
        x = embedded.requires_grad_()
        (found,) = torch.autograd.grad(penalty(x), x)
        step = 1e-6 * direction
        difference = (penalty(x + step) - penalty(x - step)) / 2e-6
    torch.testing.assert_close((found * direction).sum(), difference, rtol=1e-5, atol=0.0)
