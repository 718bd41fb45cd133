"""Configuration of a Native Hybrid Attention language model in Hugging Face format.

This file is copied into every exported directory: it imports nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

CHOICES = {
    "empty_slots": ("attend", "mask", "weight"),
    "value_activation": ("silu", "none"),
    "output_norm": ("rms", "none"),
    "qk_norm": ("none", "rms"),
}


class NHAConfig(PretrainedConfig):
    """Shape and conventions of the model. Fields that Llama has keep Llama's names.

    Args:
        windows: tokens that each layer sees exactly, the current one included; one entry per layer, None for full attention,
            0 for slots alone. None stands for 64 in every layer.
        num_slots: compressed key/value rows per KV head (M).
        tau: log-gates are logsigmoid(z) / tau.
        empty_slots: what a slot that holds little or nothing does in the softmax: `attend`, `mask` or `weight`.
        value_activation: `silu` applies SiLU to the values, `none` leaves them.
        output_norm: `rms` applies RMSNorm(SiLU(o)) over all heads before the output projection.
        qk_norm: `rms` applies RMSNorm per head to queries and keys, before both the slots and the window.
        qkv_bias: biases on the q, k and v projections.
        rope_parameters: rotary embedding of the window part in the transformers 5 form (rope_type, rope_theta, partial_rotary_factor, ...).
        layer_kinds: kind of each layer; None stands for `nha` in every layer. A layer of another kind has no window, 0 in `windows`.
        max_position_embeddings: longest sequence seen in training. Informative: the memory bounds nothing.

    Raises:
        ValueError: a value that is not allowed; the message says what is.
    """

    model_type = "nha"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the name and type that transformers reads)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        num_slots: int = 64,
        windows: list[int | None] | None = None,
        tau: float = 8.0,
        empty_slots: str = "attend",
        value_activation: str = "silu",
        output_norm: str = "rms",
        qk_norm: str = "none",
        qkv_bias: bool = False,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        layer_kinds: list[str] | None = None,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.num_slots = num_slots
        self.windows = [64] * num_hidden_layers if windows is None else list(windows)
        self.layer_kinds = ["nha"] * num_hidden_layers if layer_kinds is None else list(layer_kinds)
        self.tau = tau
        self.empty_slots = empty_slots
        self.value_activation = value_activation
        self.output_norm = output_norm
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **(rope_parameters or {})}
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        # transformers 5 keeps these as plain attributes; earlier releases take them in the base class as well.
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    def _check(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("windows", "layer_kinds"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                given = len(getattr(self, name))
                raise ValueError(f"{name} has {given} entries for {self.num_hidden_layers} layers: give one per layer")
        for layer, window in enumerate(self.windows):
            if window is not None and (not isinstance(window, int) or window < 0):
                raise ValueError(f"windows[{layer}] is {window!r}: use a number of tokens >= 0, or None for full attention")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
