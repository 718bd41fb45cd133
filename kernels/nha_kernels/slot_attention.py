"""Slots read and written chunk by chunk: a gated recurrence in parallel form, with the log-sum-exp of its logits.

Inside a chunk, with G_ti the sum of the log-gates written at i+1 .. t and S the slots before the chunk (paper, chunkwise form):

    e_t = scale * ( exp(G_t) * (S_k q_t)  +  sum_{i<=t} <q_t, k_i> exp(G_ti) (1 - exp(g_i)) )
    o_t = (p_t * exp(G_t)) S_v  +  sum_{i<=t} ( sum_m p_t[m] exp(G_ti[m]) (1 - exp(g_i[m])) ) v_i

G_ti is summed directly, never as a difference of prefix sums and never split into a growing and a shrinking factor: no exponent is
positive, so nothing overflows for any gate, and nothing cancels. The price is one [C, C, M] array a chunk; hence short chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .conventions import EmptySlots, bias_slot_logits, softmax_with_logsumexp, write_strength

_CHUNK = 16
_ELEMENTS_PER_GROUP = 2**23  # of the [C, C, M] arrays that exist at a time: bounds memory for any T


@dataclass(frozen=True)
class SlotState:
    """Slots [B, H, M, K], [B, H, M, V], their log-decay [B, H, M], and the document [B or 1] they belong to (None: one document)."""

    keys: Tensor
    values: Tensor
    log_decay: Tensor
    document: Tensor | None


def slot_attention(
    q: Tensor,
    written: tuple[Tensor, Tensor, Tensor],
    state: SlotState,
    *,
    scale: float,
    empty_slots: EmptySlots,
    anything_written: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, SlotState]:
    """Read the slots at every query, after the write that the query brings.

    Args:
        q: [B, T, HQ, K], without RoPE, accumulation dtype.
        written: keys [B, T, H, K], values [B, T, H, V], log-gates [B, T, H, M]; zeros write nothing.
        anything_written: [B or 1, T], whether the query's document has written any token up to here.
        documents: [B or 1, T]; a document starts from empty slots.

    Returns:
        Output [B, T, HQ, V] of the softmax over the slots alone, its log-sum-exp [B, T, HQ], and the state after the last token.
    """
    batch, num_tokens, kv_heads, num_slots = written[2].shape
    tokens_per_group = max(1, _ELEMENTS_PER_GROUP // max(1, batch * kv_heads * num_slots * _CHUNK * _CHUNK)) * _CHUNK
    outputs, logsumexps = [], []
    keys, values, log_decay, document = state.keys, state.values, state.log_decay, state.document
    for start in range(0, num_tokens, tokens_per_group):
        part = slice(start, min(start + tokens_per_group, num_tokens))
        arguments = (
            q[:, part],
            *(tensor[:, part] for tensor in written),
            keys,
            values,
            log_decay,
            anything_written[:, part],
            None if documents is None else documents[:, part],
            document,
            scale,
            empty_slots,
        )
        if tokens_per_group < num_tokens and torch.is_grad_enabled():
            result = checkpoint(_group_of_chunks, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            result = _group_of_chunks(*arguments)
        output, logsumexp, keys, values, log_decay = result
        document = None if documents is None else documents[:, part.stop - 1]
        outputs.append(output)
        logsumexps.append(logsumexp)
    return torch.cat(outputs, 1), torch.cat(logsumexps, 1), SlotState(keys, values, log_decay, document)


def _pad_to_chunks(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B, N, C, ...], padded with zeros, which write nothing."""
    missing = -x.shape[1] % _CHUNK
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, _CHUNK))


def _pad_documents(documents: Tensor) -> Tensor:
    """[B, T] -> [B, N, C]; padding belongs to the last document."""
    missing = -documents.shape[1] % _CHUNK
    return torch.cat([documents, documents[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, _CHUNK))


def _pairwise_log_decay(log_gates: Tensor, visible: Tensor) -> Tensor:
    """G_ti = sum of log-gates i+1 .. t for visible pairs, -inf for the others: [..., C, M] -> [..., C, C, M]."""
    size = log_gates.shape[-2]
    time = torch.arange(size, device=log_gates.device)
    after = (time[:, None] > time[None, :])[..., None]
    sums = torch.where(after, log_gates[..., :, None, :], 0.0).cumsum(-3)
    return torch.where(visible[..., None], sums, -torch.inf)


def _group_of_chunks(
    q: Tensor,
    written_keys: Tensor,
    written_values: Tensor,
    log_gates: Tensor,
    slot_keys: Tensor,
    slot_values: Tensor,
    slot_log_decay: Tensor,
    anything_written: Tensor,
    documents: Tensor | None,
    document: Tensor | None,
    scale: float,
    empty_slots: EmptySlots,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All chunks of a stretch of tokens at once. Axes: b batch, h KV head, n chunk, r query head of the group, t/i token, m slot."""
    num_tokens, kv_heads = q.shape[1], slot_keys.shape[1]
    q = _pad_to_chunks(q).unflatten(3, (kv_heads, -1)).permute(0, 3, 1, 4, 2, 5)  # [b, h, n, r, t, k]
    k, v, g = (_pad_to_chunks(x).permute(0, 3, 1, 2, 4) for x in (written_keys, written_values, log_gates))  # [b, h, n, i, .]
    some = _pad_to_chunks(anything_written)[:, None, :, None, :, None]  # [b, 1, n, 1, t, 1]

    time = torch.arange(_CHUNK, device=q.device)
    visible = time[:, None] >= time[None, :]  # [t, i]
    from_state: Tensor | None = None  # whether token t belongs to the document of the slots before its chunk: [b, 1, n, t, 1]
    if documents is not None:
        assert document is not None
        docs = _pad_documents(documents)
        before = torch.cat([document[:, None].expand(docs.shape[0], 1), docs[:, :-1, -1]], dim=1)
        visible = (visible & (docs[..., :, None] == docs[..., None, :]))[:, None]  # [b, 1, n, t, i]
        from_state = (docs == before[..., None])[:, None, :, :, None]

    decayed_write = torch.exp(_pairwise_log_decay(g, visible)) * write_strength(g)[..., None, :, :]  # [b, h, n, t, i, m]
    log_decay_from_state = g.cumsum(-2)
    state_decay = torch.exp(log_decay_from_state)
    if from_state is not None:
        state_decay = torch.where(from_state, state_decay, 0.0)

    update = decayed_write[..., -1, :, :].transpose(-1, -2)  # [b, h, n, m, i]: effect of each token on the slots after the chunk
    update_keys, update_values = update @ k, update @ v
    log_mass_update = torch.where(visible, 1.0, 0.0).to(g.dtype) @ g  # [b, h, n, t, m]
    starts = []
    for chunk in range(k.shape[2]):
        starts.append((slot_keys, slot_values, slot_log_decay))
        if from_state is not None:  # a document that starts in the chunk selects zeros: the old slots are not multiplied away
            continues = from_state[:, :, chunk, -1:, :]
            slot_keys = torch.where(continues, slot_keys, 0.0)
            slot_values = torch.where(continues, slot_values, 0.0)
            slot_log_decay = torch.where(continues[..., 0], slot_log_decay, 0.0)
        decay = state_decay[:, :, chunk, -1, :, None]
        slot_keys = decay * slot_keys + update_keys[:, :, chunk]
        slot_values = decay * slot_values + update_values[:, :, chunk]
        slot_log_decay = slot_log_decay + log_mass_update[:, :, chunk, -1]
    start_keys, start_values, start_log_decay = (torch.stack(column, dim=2) for column in zip(*starts, strict=True))

    state_decay = state_decay[:, :, :, None]  # [b, h, n, 1, t, m]
    logits = state_decay * (q @ start_keys[:, :, :, None].transpose(-1, -2))
    scores = torch.where(visible if visible.dim() == 2 else visible[:, :, :, None], q @ k[:, :, :, None].transpose(-1, -2), 0.0)
    logits = scale * (logits + torch.einsum("bhnrti,bhntim->bhnrtm", scores, decayed_write))
    if empty_slots == "weight":
        start_log_decay = start_log_decay[:, :, :, None].expand(-1, -1, -1, _CHUNK, -1)
        if from_state is not None:
            start_log_decay = torch.where(from_state, start_log_decay, 0.0)
        log_mass = (start_log_decay + log_mass_update)[:, :, :, None]
    else:
        log_mass = logits  # not read
    logits = bias_slot_logits(logits, empty_slots, anything_written=some, slot_log_decay=log_mass)
    p, logsumexp = softmax_with_logsumexp(logits)
    weights = torch.einsum("bhnrtm,bhntim->bhnrti", p, decayed_write)
    output = (p * state_decay) @ start_values[:, :, :, None] + weights @ v[:, :, :, None]

    output = output.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)[:, :num_tokens]  # [b, T, HQ, v]
    logsumexp = logsumexp.permute(0, 2, 4, 1, 3).flatten(3, 4).flatten(1, 2)[:, :num_tokens]
    return output, logsumexp, slot_keys, slot_values, slot_log_decay
