"""How often a run reads its tokens, and whether it validates on what it trains on. From the manifests of the token files, without torch.

A manifest that is missing or damaged has no line here: opening the token files says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nha_megatron.config import BlendEntry, RunConfig

# Up to about four epochs repeated tokens are worth nearly as much as new ones (Muennighoff et al. 2023, arXiv 2305.16264).
FEW_EPOCHS = 4.0


class Reading(NamedTuple):
    """Lines about what is read, and those to warn with."""

    lines: list[str]
    warnings: list[str]


class _Corpus(NamedTuple):
    tokens: int
    content: str  # checksum of the tokens: the same corpus under another name is the same


def describe_reading(config: RunConfig) -> Reading:
    """Tokens at hand, epochs, and validation that overlaps with training, over all stages of the run."""
    found = Reading([], [])
    names: dict[str, str] = {}
    at_hand: dict[str, int] = {}
    read: dict[str, float] = {}
    for stage in config.stages:
        tokens = stage.tokens_after - stage.tokens_before
        for entry, share, corpus in _corpora(stage.config.data.training_blend):
            names.setdefault(corpus.content, entry.path)
            at_hand[corpus.content] = corpus.tokens
            read[corpus.content] = read.get(corpus.content, 0.0) + share * tokens
    for content, name in names.items():
        epochs = read[content] / at_hand[content]
        found.lines.append(f"{name}: {at_hand[content]:,} tokens at hand, {read[content]:,.0f} read by the run: {_epochs(epochs)}")
        if epochs > FEW_EPOCHS:
            found.warnings.append(
                f"the run reads {name} {_epochs(epochs)}: tokens seen more than about {FEW_EPOCHS:g} times teach little, and the "
                "training loss falls by heart. Prepare more data, or train for fewer training.steps"
            )
    if config.training.validate_every is not None:
        _describe_validation(config, names, found)
    return found


def _describe_validation(config: RunConfig, training: dict[str, str], found: Reading) -> None:
    for entry, share, corpus in _corpora(config.data.validation_blend):
        reads = max(
            share * config.training.validate_batches * stage.config.training.global_batch_size * stage.config.data.sequence_length
            for stage in config.stages
        )
        epochs = reads / corpus.tokens
        found.lines.append(f"validation {entry.path}: {corpus.tokens:,} tokens at hand, {reads:,.0f} read each time: {_epochs(epochs)}")
        if epochs > 1:
            found.warnings.append(
                f"every validation reads {entry.path} {_epochs(epochs)}: what is read again says nothing new. Lower "
                "training.validate_batches, or prepare more validation data"
            )
        if corpus.content in training:
            found.warnings.append(
                f"validation {entry.path} holds the same tokens as {training[corpus.content]}, which the run trains on: its loss says "
                "nothing about other text. Name other token files in data.validation"
            )


def _corpora(blend: tuple[BlendEntry, ...]) -> Iterator[tuple[BlendEntry, float, _Corpus]]:
    total = sum(entry.weight for entry in blend)
    for entry in blend:
        try:
            fields: dict[str, Any] = json.loads(Path(f"{entry.path}.json").read_bytes())
            corpus = _Corpus(int(fields["tokens"]), str(fields["bin"]["sha256"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if corpus.tokens > 0:
            yield entry, entry.weight / total, corpus


def _epochs(count: float) -> str:
    return f"{count:.3g} times" if count > 1 else f"{count:.1%}"
