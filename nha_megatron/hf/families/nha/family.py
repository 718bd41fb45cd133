"""Our own exported models: their configuration is read and compared, and the table of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.hf.families.family import Family
from nha_megatron.hf.families.nha.configuration_nha import NHAConfig
from nha_megatron.layers.hugging_face import (
    Entry,
    HuggingFaceLayer,
    form_of,
    merge_gate_up,
    pad_vocabulary,
    split_gate_up,
    strip_vocabulary,
)
from nha_megatron.layers.kind import LayerKind

# (ours, theirs): what weights cannot be used without, beside what layer kinds say. RoPE may be changed on a trained model.
ARCHITECTURE = (
    ("num_layers", "num_hidden_layers"),
    ("hidden_size", "hidden_size"),
    ("ffn_hidden_size", "intermediate_size"),
    ("num_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("qkv_bias", "qkv_bias"),
    ("norm_eps", "rms_norm_eps"),
    ("tie_embeddings", "tie_word_embeddings"),
    ("vocab_size", "vocab_size"),
)


class NHAFamily(Family):
    """Any stack of layer kinds that have a Hugging Face form."""

    model_type = "nha"

    def read_config(self, content: Mapping[str, Any], path: Path) -> NHAConfig:
        try:
            return NHAConfig.from_dict(dict(content))
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: {error}") from None

    def differences(self, theirs: NHAConfig, ours: ModelConfig) -> list[str]:
        found = [
            f"model.{mine} is {getattr(ours, mine)!r}, the directory has {getattr(theirs, their)!r}"
            for mine, their in ARCHITECTURE
            if getattr(ours, mine) != getattr(theirs, their)
        ]
        kinds = [layer.kind.name for layer in ours.stack]
        if len(kinds) == len(theirs.layer_kinds) and kinds != theirs.layer_kinds:
            return [*found, f"model.layers makes the layers {kinds}, the directory has {theirs.layer_kinds}"]
        for form, layers in forms_of(ours):
            found += form.differences(theirs, layers, ours)
        return found

    def entries(self, model: ModelConfig) -> list[Entry]:
        hidden = model.hidden_size
        vocabulary = (model.padded_vocab_size, hidden)
        table = [Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary, strip_vocabulary, pad_vocabulary)]
        forms = {number: form for form, layers in forms_of(model) for number in layers}
        for i, layer in enumerate(model.stack):
            ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
            gate_up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
            table += [
                Entry(f"{ours}input_layernorm.weight", (f"{theirs}input_layernorm.weight",), (hidden,)),
                *forms[i].entries(f"{ours}self_attention.", f"{theirs}self_attn.", layer.options, model),
                Entry(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",), (hidden,)),
                Entry(f"{ours}mlp.linear_fc1.weight", gate_up, (2 * model.ffn_hidden_size, hidden), split_gate_up, merge_gate_up),
                Entry(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",), (hidden, model.ffn_hidden_size)),
            ]
        table.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,)))
        if not model.tie_embeddings:
            table.append(Entry("output_layer.weight", ("lm_head.weight",), vocabulary, strip_vocabulary, pad_vocabulary))
        return table


FAMILY = NHAFamily()


def require_exportable(model: ModelConfig) -> None:
    """Raises `ConfigError` naming the layers whose kind has no Hugging Face form."""
    lacking: dict[str, list[int]] = {}
    for number, layer in enumerate(model.stack):
        if layer.kind.hugging_face is None:
            lacking.setdefault(layer.kind.name, []).append(number)
    if lacking:
        layers = "; ".join(f"layer(s) {', '.join(map(str, numbers))} of kind {name!r}" for name, numbers in lacking.items())
        raise ConfigError(
            f"this model cannot be exported: {layers} have no Hugging Face form, because the kind gives none (LayerKind.hugging_face). "
            "Export a model of other layers, or add the form to the kind"
        )


def kinds_of(model: ModelConfig) -> list[LayerKind]:
    """Each kind of the stack once, in the order of their names."""
    return sorted({layer.kind for layer in model.stack}, key=lambda kind: kind.name)


def forms_of(model: ModelConfig) -> Iterator[tuple[HuggingFaceLayer, dict[int, Any]]]:
    """Hugging Face form of each kind, and its layers (number -> options)."""
    require_exportable(model)
    for kind in kinds_of(model):
        yield form_of(kind), {number: layer.options for number, layer in enumerate(model.stack) if layer.kind == kind}
