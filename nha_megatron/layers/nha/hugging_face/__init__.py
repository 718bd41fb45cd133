"""NHA layers in an exported Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nha_kernels
from nha_megatron.config.model import ModelConfig
from nha_megatron.layers.hugging_face import Entry, HuggingFaceLayer, merge_qkv, split_qkv
from nha_megatron.layers.nha import cost
from nha_megatron.layers.nha.config import NHAOptions

# What the weights of a layer cannot be used without. Window and empty_slots may be changed on a trained model.
_ARCHITECTURE = ("num_slots", "tau", "value_activation", "output_norm", "qk_norm")

_NAMES = {"linear_gate": "g_proj", "linear_proj": "o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm", "output_norm": "o_norm"}


class NHAHuggingFace(HuggingFaceLayer):
    """`self_attn` with q_proj, k_proj, v_proj, g_proj (log-gates), o_proj and the norms that are on."""

    def entries(self, ours: str, theirs: str, o: NHAOptions, model: ModelConfig) -> Iterator[Entry]:
        qkv = [f"{theirs}{name}_proj" for name in "qkv"]
        for weight in cost.weights(o, model):
            module, kind = weight.name.split(".")
            if module == "linear_qkv":
                yield Entry(ours + weight.name, tuple(f"{name}.{kind}" for name in qkv), weight.shape, split_qkv, merge_qkv)
            else:
                yield Entry(ours + weight.name, (f"{theirs}{_NAMES[module]}.{kind}",), weight.shape)

    def to_fields(self, layers: Mapping[int, Any], model: ModelConfig) -> dict[str, Any]:
        windows = [layers[number].window if number in layers else 0 for number in range(model.num_layers)]
        options: NHAOptions = next(iter(layers.values()))
        return {"windows": windows, "empty_slots": options.empty_slots, **{name: getattr(options, name) for name in _ARCHITECTURE}}

    def differences(self, theirs: Any, layers: Mapping[int, Any], model: ModelConfig) -> list[str]:
        options: NHAOptions = next(iter(layers.values()))
        return [
            f"model.{name} is {getattr(options, name)!r}, the directory has {getattr(theirs, name)!r}"
            for name in _ARCHITECTURE
            if getattr(options, name) != getattr(theirs, name)
        ]

    def attention_class(self) -> Any:
        from nha_megatron.layers.nha.hugging_face.attention import NHAAttention

        return NHAAttention

    def sources(self) -> Sequence[tuple[str, Path]]:
        return [
            ("nha_kernels", Path(nha_kernels.__file__).with_name("operator.py")),
            ("nha_megatron.layers.nha.hugging_face.attention", Path(__file__).with_name("attention.py")),
        ]


HUGGING_FACE = NHAHuggingFace()
