"""The Hugging Face model on a GPU, where lengths, masks and memories must not stray to the CPU."""

import pytest
import torch

from tests.hf.hf_cases import hf_model, random_tokens, tiny_model


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}], ids=str)
def test_left_padded_generation_equals_the_cpu(options: dict) -> None:
    # Sizes that the fast kernels take, too.
    model = hf_model(tiny_model(head_dim=32, num_slots=16, window="16,full,0"))
    tokens, mask = random_tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, :7] = mask[2, :33] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **options}
    expected = model.generate(tokens, **options)
    generated = model.cuda().generate(tokens.cuda(), **{**options, "attention_mask": mask.cuda()})
    assert torch.equal(generated.cpu(), expected)


@pytest.mark.gpu
def test_bfloat16_prefill_in_pieces_stays_close_to_one_call() -> None:
    model = hf_model(tiny_model(head_dim=32, num_slots=16, window="16,full,0")).to("cuda", torch.bfloat16)
    tokens = random_tokens(2, 70).cuda()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits.float()
        first = model(tokens[:, :50], use_cache=True)
        second = model(tokens[:, 50:], past_key_values=first.past_key_values)
    pieces = torch.cat([first.logits, second.logits], dim=1).float()
    # bfloat16 keeps 8 bits: single roundings differ by 0.4 %, a few layers of them by a few percent of the norm.
    assert (pieces - whole).norm() < 0.05 * whole.norm()
