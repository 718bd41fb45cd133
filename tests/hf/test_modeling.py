"""The Hugging Face model by itself: the cache is the memory, whatever way the tokens arrive."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_megatron.hf.families.nha.modeling_nha import NHACache, NHAForCausalLM
from tests.hf.hf_cases import VARIANTS, hf_model, random_tokens, tiny_model

# Logits are of order 1 to 10; the ways of computing them differ in the order of float32 sums only.
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def continued(model: NHAForCausalLM, tokens: Tensor, cuts: list[int], **kwargs: Any) -> tuple[Tensor, NHACache]:
    """Logits of all tokens, given in pieces that end at `cuts`; a mask grows with them."""
    cache, pieces, mask = None, [], kwargs.pop("attention_mask", None)
    for start, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :end]
        output = model(tokens[:, start:end], past_key_values=cache, attention_mask=seen, use_cache=True, **kwargs)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), cache


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [3, 9, 10]], ids=str)
def test_prefill_in_pieces_equals_one_call(variant: str, cuts: list[int]) -> None:
    model = hf_model(tiny_model(**VARIANTS[variant]))
    tokens = random_tokens(2, 13)
    whole = model(tokens, use_cache=False).logits
    pieces, cache = continued(model, tokens, cuts)
    torch.testing.assert_close(pieces, whole, **TOLERANCE)
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation_equals_repeated_full_forward(variant: str) -> None:
    model = hf_model(tiny_model(**VARIANTS[variant]))
    prompt = random_tokens(2, 7)
    output = model.generate(prompt, max_new_tokens=10, min_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True)
    tokens = output.sequences
    for step, logits in enumerate(output.logits):
        full = model(tokens[:, : 7 + step], use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, full, **TOLERANCE)
        allowed = full.clone()
        allowed[:, 0] = -torch.inf  # min_new_tokens forbids the end-of-text token
        assert torch.equal(tokens[:, 7 + step], allowed.argmax(-1))
    assert isinstance(output.past_key_values, NHACache)


def test_generation_without_a_cache_gives_the_same_tokens() -> None:
    model = hf_model(tiny_model())
    prompt = random_tokens(2, 7)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


def test_generate_with_chunked_prefill_gives_the_same_tokens() -> None:
    model = hf_model(tiny_model())
    prompt = random_tokens(2, 11)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, prefill_chunk_size=4, **options), model.generate(prompt, **options))


def test_generate_continues_from_a_cache() -> None:
    model = hf_model(tiny_model())
    prompt = random_tokens(1, 9)
    cache = model(prompt[:, :6], use_cache=True).past_key_values
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), model.generate(prompt, **options))


def test_beam_search_equals_beam_search_without_a_cache() -> None:
    model = hf_model(tiny_model(window=4))
    prompt = random_tokens(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


def test_sampling_draws_several_sequences() -> None:
    model = hf_model(tiny_model(window=4))
    torch.manual_seed(0)
    sampled = model.generate(random_tokens(1, 5), max_new_tokens=8, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    uncached = model.generate(random_tokens(1, 5), max_new_tokens=8, do_sample=True, num_return_sequences=3, use_cache=False)
    assert sampled.shape[0] == 3 and torch.equal(sampled, uncached)


def cache_bytes(cache: NHACache) -> int:
    """Bytes that the cache keeps alive, not only those it shows."""
    return sum(value.untyped_storage().nbytes() for memory in cache.states for value in vars(memory).values() if isinstance(value, Tensor))


def test_cache_of_finite_windows_has_one_size_for_any_length() -> None:
    model = hf_model(tiny_model(window="4,0,7"))
    sizes = {length: cache_bytes(continued(model, random_tokens(1, length), [length - 1])[1]) for length in (8, 16, 64)}
    assert len(set(sizes.values())) == 1, sizes


def test_cache_of_a_full_layer_grows() -> None:
    model = hf_model(tiny_model())
    short, long = (cache_bytes(model(random_tokens(1, length), use_cache=True).past_key_values) for length in (8, 16))
    assert long > short


# Padding is as if it were not there, wherever it stands: 1 marks a token, 0 padding.
MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("variant", ["from_scratch", "converted"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("cuts", [None, [], [4], [2, 5, 6]], ids=str)
def test_padded_rows_equal_rows_without_padding(variant: str, kind: str, cuts: list[int] | None) -> None:
    model = hf_model(tiny_model(**VARIANTS[variant]))
    tokens, mask = random_tokens(3, 9), torch.tensor(MASKS[kind])
    if cuts is None:
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
    else:
        logits, cache = continued(model, tokens, cuts, attention_mask=mask)
        assert cache.states[0].length.tolist() == mask.sum(1).tolist()
    for row in range(3):
        real = mask[row].bool()
        if real.any():
            alone = model(tokens[row, real][None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, real], alone, **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}], ids=str)
def test_left_padded_batch_generates_what_each_prompt_generates_alone(options: dict[str, Any]) -> None:
    model = hf_model(tiny_model())
    prompts = [random_tokens(1, length, seed=length) for length in (3, 8, 5)]
    batch = torch.cat([torch.nn.functional.pad(prompt, (8 - prompt.shape[1], 0), value=1) for prompt in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(prompt), (8 - prompt.shape[1], 0)) for prompt in prompts])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    together = model.generate(batch, attention_mask=mask, **options)[:, 8:]
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], model.generate(prompt, **options)[0, prompt.shape[1] :])


def test_packed_documents_do_not_see_each_other() -> None:
    model = hf_model(tiny_model())
    tokens = random_tokens(2, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    packed = model(tokens, position_ids=positions)
    assert packed.past_key_values is None
    for row, bounds in ((0, [0, 4, 7, 8, 10]), (1, [0, 10])):
        for start, end in itertools.pairwise(bounds):
            alone = model(tokens[row : row + 1, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed.logits[row, start:end], alone, **TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 7, 8]])}, "count up by one"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": True}, "cannot fill a cache"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "one entry per token"),
        ({"attention_mask": torch.ones(1, 5)}, "one entry per token"),
        ({"output_attentions": True}, "output_attentions is not available"),
        ({"past_key_values": object()}, "NHACache only"),
        ({"inputs_embeds": torch.zeros(1, 6, 32)}, "exactly one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_model(tiny_model())(random_tokens(1, 6), **arguments)


def test_generation_refuses_caches_that_are_not_the_memory() -> None:
    model = hf_model(tiny_model())
    with pytest.raises(ValueError, match="one cache, its memory"):
        model.generate(random_tokens(1, 4), cache_implementation="static", max_new_tokens=2)


def test_assisted_generation_is_refused() -> None:
    model = hf_model(tiny_model())
    with pytest.raises(ValueError, match="stateful"):
        model.generate(random_tokens(1, 4), assistant_model=model, max_new_tokens=2)


def test_hidden_states_and_tuple_output() -> None:
    model = hf_model(tiny_model())
    output = model(random_tokens(1, 6), output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(random_tokens(1, 6), return_dict=False, use_cache=False)[0], output.logits)


def test_embeddings_may_be_given_in_place_of_tokens() -> None:
    model = hf_model(tiny_model())
    tokens = random_tokens(2, 6)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, model(tokens).logits)


def test_logits_to_keep() -> None:
    model = hf_model(tiny_model())
    tokens = random_tokens(1, 6)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:], **TOLERANCE)


def test_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model = hf_model(tiny_model())
    tokens = random_tokens(2, 8)
    labels = tokens.clone()
    labels[0, :3] = -100
    output = model(tokens, labels=labels)
    log_p = output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, -log_p[counted].mean())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = hf_model(tiny_model()).train()
    tokens = random_tokens(2, 9)
    gradients = []
    with torch.enable_grad():
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            output = model(tokens, labels=tokens)
            output.loss.backward()
            assert output.past_key_values is None  # no cache in training unless it is asked for
            gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    with pytest.raises(ValueError, match="gradient checkpointing cannot be combined with a cache"):
        model(tokens, use_cache=True)


def test_tied_embeddings_stay_tied_when_resized() -> None:
    model = hf_model(tiny_model(tie_embeddings=True))
    tokens = random_tokens(1, 6)
    before = model(tokens).logits
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == 70
    torch.testing.assert_close(model(tokens).logits[..., :61], before, **TOLERANCE)


def test_bfloat16_keeps_slots_and_frequencies_wide() -> None:
    model = hf_model(tiny_model()).to(torch.bfloat16)
    cache = model(random_tokens(1, 9), use_cache=True).past_key_values
    memory = cache.states[0]
    assert memory.slot_keys.dtype == torch.float32 and memory.window_keys.dtype == torch.bfloat16
    assert model.model.rope(torch.device("cpu"))[0].dtype == torch.float64


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant: str, tmp_path) -> None:
    model = hf_model(tiny_model(**VARIANTS[variant]))
    model.save_pretrained(tmp_path)
    again = NHAForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.windows == [4, None, 0]
    tokens = random_tokens(1, 9)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
