"""Native Hybrid Attention language model for transformers.

A layer of Native Hybrid Attention keeps M compressed slots and an exact window per KV head and reads both with one softmax (arXiv
2510.07019). The cache is that memory, so its size does not depend on the length of the sequence (except in layers with full attention).

Shapes: B batch, T new tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from nha_megatron.config.rope import inverse_frequencies, rope_problems
from nha_megatron.hf.families.nha.attention_classes import attention_class
from nha_megatron.hf.families.nha.token_placement import DOCUMENT_KEYWORDS, refuse_unknown_keywords, token_placement
from nha_megatron.layers.modeling import LayerState, NHARMSNorm, TokenPlacement

from .configuration_nha import NHAConfig

logger = logging.get_logger(__name__)

LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")


class NHACache(Cache):
    """What every layer remembers. Pass it as `past_key_values`; `generate` makes its own."""

    def __init__(self, config: NHAConfig) -> None:
        super().__init__(layers=[])
        self.states: list[LayerState | None] = [None] * config.num_hidden_layers
        self.seen = 0  # positions of the batch so far, padding included; LayerState.length counts the tokens of each sequence

    def store(self, layer: int, state: LayerState) -> None:
        # A state may be a view of the tokens it was cut from: without a copy it would keep the whole prompt alive.
        self.states[layer] = state.map(lambda x: x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1  # the same, under its name in earlier releases

    @property
    def batch_size(self) -> int:
        return -1 if self.states[0] is None else self.states[0].length.shape[0]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.states = [None] * len(self.states)
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [None if state is None else state.select_rows(indices) for state in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a memory cannot forget tokens it has compressed: assisted generation is not supported")

    def activate_past_recording(self) -> None:
        self.crop(0)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("an NHACache is written by the layers of an NHA model: use it with no other model")

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"NHACache(layers={len(self)}, batch={self.batch_size}, seen={self.seen})"


def rotary_frequencies(config: NHAConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] in float64 on the CPU, and the factor on the rotated channels (YaRN)."""
    scaling = dict(config.rope_parameters)
    theta, rotary_dim = scaling.pop("rope_theta"), int(config.head_dim * scaling.pop("partial_rotary_factor", 1.0))
    problems = rope_problems(scaling, theta, rotary_dim)
    if problems:
        raise ValueError("rope_parameters: " + "; ".join(problems))
    frequencies, factor = inverse_frequencies(rotary_dim, theta, scaling)
    return torch.tensor(frequencies, dtype=torch.float64, device="cpu"), factor


class NHAMLP(nn.Module):
    def __init__(self, config: NHAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NHADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: NHAConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = attention_class(config.layer_kinds[layer_idx])(config, layer_idx)
        self.mlp = NHAMLP(config)
        self.input_layernorm = NHARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NHARMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, rope: tuple[Tensor, float], placement: TokenPlacement, cache: NHACache | None) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), rope, placement, cache)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NHAPreTrainedModel(PreTrainedModel):
    config_class = NHAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NHADecoderLayer"]  # noqa: RUF012 (read by transformers)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = True  # a memory cannot be rolled back: `generate` then refuses assisted generation

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The names of other implementations are accepted, because scripts give them to every model; nothing is loaded for them."""
        name = attn_implementation or "eager"
        if name != "eager" and (name in ("sdpa", "flex_attention") or "flash" in name):
            logger.warning_once(
                f"attn_implementation={name!r} changes nothing in an NHA model: its own operator computes slots and window in one softmax"
            )
            name = "eager"
        return super()._check_and_adjust_attn_implementation(name, *args, **kwargs)


class NHAModel(NHAPreTrainedModel):
    def __init__(self, config: NHAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([NHADecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = NHARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Not a buffer: `model.to(torch.bfloat16)` would round the frequencies.
        self._rope: dict[torch.device, tuple[Tensor, float]] = {}
        self.post_init()

    def rope(self, device: torch.device) -> tuple[Tensor, float]:
        if device not in self._rope:
            frequencies, factor = rotary_frequencies(self.config)
            self._rope[device] = (frequencies.to(device), factor)
        return self._rope[device]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NHACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of the new tokens, and the memory after them.

        Args:
            attention_mask: [B, past + T] of 0 and 1. Padding may be anywhere: it is treated as if it were not there. Larger integers
                number packed documents: 1 1 1 2 2.
            position_ids: [B or 1, T]. Needed only for packed documents, whose positions start again; where they do, the memory
                starts empty. Otherwise they must count up, because the layers use distances between tokens alone.
            cu_seq_lens_q, cu_seq_lens_k, cu_seqlens, seq_idx: other ways to mark packed documents (`token_placement`).
            past_key_values: an `NHACache`; its memory is continued and replaced.

        Raises:
            ValueError: a mask, markers or a cache that cannot be honoured exactly. TypeError: a keyword that nothing reads.
        """
        markers = {name: kwargs.pop(name, None) for name in DOCUMENT_KEYWORDS}
        if kwargs:
            refuse_unknown_keywords(kwargs, inspect.signature(NHAModel.forward).parameters)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is not available: slots and window share one softmax whose weights are never stored")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.seen
        placement = token_placement(
            hidden_states.shape[:2], past, hidden_states.device, attention_mask=attention_mask, position_ids=position_ids, **markers
        )
        if placement.cu_seqlens is not None and cache is not None:
            if past_key_values is not None or use_cache:
                raise ValueError("several documents in one row cannot fill a cache: pass use_cache=False")
            cache = None

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, self.rope(hidden_states.device), placement, cache)
            states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        if cache is not None:
            cache.seen += hidden_states.shape[1]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=(*states[:-1], hidden_states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _cache(self, past_key_values: Any, use_cache: bool | None) -> NHACache | None:
        if past_key_values is not None and not isinstance(past_key_values, NHACache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}: this model continues from an NHACache only")
        recomputing = self.gradient_checkpointing and self.training  # a layer that runs twice would write its memory twice
        if recomputing and (past_key_values is not None or use_cache):
            raise ValueError("gradient checkpointing cannot be combined with a cache: pass use_cache=False and no past_key_values")
        if past_key_values is None and (use_cache or (use_cache is None and self.config.use_cache and not self.training)):
            return NHACache(self.config)
        return past_key_values


class NHAForCausalLM(NHAPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (read by transformers)

    def __init__(self, config: NHAConfig) -> None:
        super().__init__(config)
        self.model = NHAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: an NHA model has one cache, its memory; leave it unset"
            )
        generation_config.cache_implementation = None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = NHACache(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NHACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Next-token logits [B, T, vocabulary]; arguments as `NHAModel.forward`.

        Args:
            labels: [B, T], shifted inside, -100 where no loss is wanted.
            logits_to_keep: compute logits of the last so many positions only (0: all), or of the given positions.
            shift_labels, num_items_in_batch, ignore_index: as the loss functions of transformers take them.
        """
        loss_keywords = {name: kwargs.pop(name) for name in LOSS_KEYWORDS if name in kwargs}
        if kwargs:
            refuse_unknown_keywords(kwargs, [*inspect.signature(NHAForCausalLM.forward).parameters, *LOSS_KEYWORDS])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or loss_keywords.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_keywords)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return output.to_tuple() if return_dict is False else output
