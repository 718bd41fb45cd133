"""The attention class of each layer kind. In an exported modelling file a table of the kinds that the model has takes its place."""

from __future__ import annotations

from torch import nn

from nha_megatron.layers.registry import kind_named


def attention_class(kind: str) -> type[nn.Module]:
    """Class of the attention of a layer, built with (config, layer_idx)."""
    form = kind_named(kind).hugging_face
    if form is None:
        raise ValueError(f"layer kind {kind!r} has no Hugging Face form")
    found: type[nn.Module] = form.attention_class()
    return found
