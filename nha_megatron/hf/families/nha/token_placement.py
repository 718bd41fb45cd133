"""What the arguments of a call say about its batch: padding, or packed documents. Honoured exactly, or refused.

Trainers mark packed documents in several ways. Each is read; where two are given they must agree. Documents see nothing of each other.

    attention_mask   [B, past + T]  integers: 0 padding, 1 a token; 1 1 1 2 2: the number of each token's document
    position_ids     [B or 1, T]    start again where a document begins
    cu_seq_lens_q, cu_seq_lens_k, cu_seqlens   [N + 1]  boundaries in the flattened batch, which has no padding
    seq_idx          [B, T]         the number of each token's document
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from nha_megatron.layers.modeling import TokenPlacement

BOUNDARY_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
DOCUMENT_KEYWORDS = (*BOUNDARY_KEYWORDS, "seq_idx")
# What callers pass beside the markers, and what says nothing that this model could get wrong.
SILENT_KEYWORDS = ("max_length_q", "max_length_k", "cache_position", "is_first_iteration", "next_sequence_length")


def refuse_unknown_keywords(keywords: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises TypeError for a keyword that nothing reads: a misspelt marker would change the result silently."""
    for name, value in keywords.items():
        if name in (*SILENT_KEYWORDS, *DOCUMENT_KEYWORDS) or value is None:
            continue
        if name == "token_type_ids" and not bool(torch.as_tensor(value != 0).any()):  # some tokenizers return it, all zero
            continue
        allowed = sorted({*known, *DOCUMENT_KEYWORDS} - {"self", "kwargs"})
        close = get_close_matches(name, allowed, 1)
        raise TypeError(
            f"unexpected keyword {name!r}: " + (f"did you mean {close[0]}?" if close else f"allowed are {', '.join(allowed)}. Leave it out")
        )


def token_placement(
    shape: torch.Size,
    past: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **markers: Tensor | None,
) -> TokenPlacement:
    """What the arguments say about [B, T] new tokens after `past` positions. `markers`: DOCUMENT_KEYWORDS.

    Raises:
        ValueError: they describe something that this model cannot compute exactly, or contradict each other.
    """
    batch, length = shape
    given = {name: marker.to(device) for name, marker in markers.items() if marker is not None}
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    position_ids = None if position_ids is None else position_ids.to(device)
    real, numbers = _read_mask(attention_mask, batch, past, length)
    if batch * length == 0 or (position_ids is None and numbers is None and not given):
        return TokenPlacement(real)
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: this model takes one entry per token, ({batch} or 1, {length})"
        )
    if length == 1 and numbers is None and not given and not (past and position_ids is not None and bool(position_ids.eq(0).any())):
        return TokenPlacement(real)

    tokens = torch.ones(batch, length, dtype=torch.bool, device=device) if real is None else real
    before = _previous_token(tokens)
    begins: dict[str, Tensor] = {}  # [B, T]: True at the first token of each document
    if numbers is not None:
        begins["attention_mask"] = _where_numbers_change("attention_mask", numbers, tokens, before)
    for name, marker in given.items():
        if name == "seq_idx":
            if marker.shape != (batch, length):
                raise ValueError(f"seq_idx has shape {tuple(marker.shape)}: this model takes one entry per token, ({batch}, {length})")
            begins[name] = _where_numbers_change(name, marker.long(), tokens, before)
        elif real is not None:
            raise ValueError(f"{name} counts a batch without padding, attention_mask has some: leave the padding out, or {name}")
        else:
            begins[name] = _at_boundaries(name, marker, batch, length)
    first_name = next(iter(begins), "")
    for name, other in begins.items():
        if not torch.equal(other, begins[first_name]):
            raise ValueError(f"{first_name} and {name} mark other documents: give one of them, or both alike")
    if position_ids is not None:
        restarts = _where_positions_restart(position_ids.expand(batch, length), tokens, before, past, attention_mask)
        if begins and bool((restarts & ~begins[first_name]).any()):
            raise ValueError(f"position_ids starts again where {first_name} marks no document: give one of them, or both alike")
        begins.setdefault(first_name, restarts)
    return _placement(begins[first_name], real, tokens, before, past)


def _placement(begins: Tensor, real: Tensor | None, tokens: Tensor, before: Tensor, past: int) -> TokenPlacement:
    if not bool((begins & (before >= 0)).any()):
        return TokenPlacement(real)  # one document a row
    if past:
        raise ValueError("several documents in one row cannot continue a cache: pass them without past_key_values")
    starts = begins[tokens].nonzero().squeeze(1)
    end = torch.tensor([int(tokens.sum())], device=starts.device)
    return TokenPlacement(real, torch.cat([starts, end]).int())


def _read_mask(mask: Tensor | None, batch: int, past: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Which new tokens are real (None: all), and their documents' numbers where the mask gives several."""
    if mask is None:
        return None, None
    if mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: this model takes one entry per token, "
            f"({batch}, {past + length}) for {past} cached and {length} new positions"
        )
    if mask.numel() == 0:
        return None, None
    if mask.is_floating_point():
        if not bool(((mask == 0) | (mask == 1)).all() & (mask == 1).any()):
            raise ValueError(
                "attention_mask is a floating tensor with other values than 0 and 1, as masks that are added to logits are: give integers, "
                "1 for a token and 0 for padding"
            )
        mask = mask.bool()
    low, high = (int(x) for x in torch.stack(mask.int().aminmax()).tolist())
    if low < 0:
        raise ValueError(
            f"attention_mask has the value {low}: give 0 for padding, 1 for a token, or the numbers of packed documents from 1"
        )
    if high > 1 and past:
        raise ValueError("attention_mask numbers packed documents: these cannot continue a cache, pass them without past_key_values")
    real = None if low > 0 else mask[:, past:].bool()
    if real is not None and past and bool(real.all()):
        real = None
    return real, mask.long() if high > 1 else None


def _previous_token(tokens: Tensor) -> Tensor:
    """[B, T] place of the last token before each place that is not padding, -1 where there is none."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    last = torch.where(tokens, place, -1).cummax(dim=1).values
    return torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)


def _where_numbers_change(name: str, numbers: Tensor, tokens: Tensor, before: Tensor) -> Tensor:
    step = numbers - numbers.gather(1, before.clamp(min=0))
    follows = tokens & (before >= 0)
    if bool((follows & (step < 0)).any()) or bool((tokens & (numbers < 0)).any()):
        raise ValueError(f"{name} must number the documents of a row from left to right, none of them negative")
    return tokens & ~(follows & (step == 0))


def _at_boundaries(name: str, boundaries: Tensor, batch: int, length: int) -> Tensor:
    total = batch * length
    if boundaries.dim() != 1 or boundaries.is_floating_point() or boundaries.shape[0] < 2:
        raise ValueError(f"{name} must be integers [N + 1] for N documents, given {boundaries.dtype} {tuple(boundaries.shape)}")
    values = boundaries.long()
    if int(values[0]) != 0 or int(values[-1]) != total or bool((values.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to the {total} tokens of the batch, given {values[:8].tolist()} ...")
    begins = torch.zeros(total, dtype=torch.bool, device=values.device)
    begins[values[values < total]] = True
    begins = begins.view(batch, length)
    if not bool(begins[:, 0].all()):
        raise ValueError(f"{name} has a document that goes on in the next row of the batch: end documents with the row")
    return begins


def _where_positions_restart(positions: Tensor, tokens: Tensor, before: Tensor, past: int, mask: Tensor | None) -> Tensor:
    place = torch.arange(tokens.shape[1], device=tokens.device)
    step = positions - positions.gather(1, before.clamp(min=0))
    follows = tokens & (before >= 0)
    # Over padding, positions may count it or leave it out.
    regular = (step == 1) | (step == place - before)
    first = positions.gather(1, tokens.int().argmax(dim=1, keepdim=True))  # of each row; some trainers start at 1
    restarts = follows & ~regular & ((positions == 0) | (positions == first))
    if bool((follows & ~regular & ~restarts).any()):
        raise ValueError(
            "position_ids must count up by one, because this model uses distances between tokens only. They start again, at 0 or at the "
            "row's first position, where a packed document begins"
        )
    begins = tokens & (before < 0)
    if past:
        continued = torch.ones_like(begins[:, :1]) if mask is None else mask[:, :past].bool().any(dim=1, keepdim=True)
        if bool((begins & continued & (positions == 0)).any()):
            raise ValueError("position_ids starts at 0 behind a cache that holds tokens: pass the document without past_key_values")
    return begins | restarts
