"""Parameters, FLOPs and state of a model. What a layer's attention counts, its kind says."""

from __future__ import annotations

from nha_megatron.config.model import ModelConfig
from nha_megatron.layers.kind import Weight, dense_flops
from nha_megatron.layers.pattern import Layer, sum_over


def attention_weights(model: ModelConfig, layer: Layer) -> tuple[Weight, ...]:
    """Every weight of the layer's attention module."""
    return tuple(layer.kind.weights(layer.options, model))


def layer_parameters(model: ModelConfig, layer: Layer) -> int:
    """Weights of one block: attention, SwiGLU (gate, up, down; no biases) and the two RMSNorms before them."""
    attention = sum(weight.count for weight in attention_weights(model, layer))
    return attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size


def replicated_parameters(model: ModelConfig, layer: Layer) -> int:
    """Those of them that every tensor rank holds."""
    return 2 * model.hidden_size + sum(weight.count for weight in attention_weights(model, layer) if not weight.sharded)


def embedding_parameters(model: ModelConfig) -> int:
    """Weights of the embedding and output matrices, padding included."""
    return model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)


def num_parameters(model: ModelConfig, embeddings: bool = True) -> int:
    """Weights of the model: blocks, final RMSNorm and, unless told otherwise, the embedding and output matrices."""
    blocks: int = sum_over(model.stack, lambda layer: layer_parameters(model, layer))
    return blocks + model.hidden_size + (embedding_parameters(model) if embeddings else 0)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of forward and backward for one token of a sequence of that length.

    Every product of the forward has two in the backward, hence a factor 3. What an implementation computes again (attention
    probabilities, chunk states, recomputed layers) is not counted: the count stands for the model, so utilisation compares across kernels.
    """
    attention: float = sum_over(model.stack, lambda layer: layer.kind.flops(layer.options, model, sequence_length))
    mlps = model.num_layers * dense_flops(3 * model.ffn_hidden_size, model.hidden_size)
    return 3.0 * (attention + mlps + dense_flops(model.padded_vocab_size, model.hidden_size))


def state_bytes(model: ModelConfig, length: int | None = None, element_bytes: int = 2) -> int:
    """Bytes that all layers remember of one sequence of `length` tokens (None: longer than every window).

    Raises `ConfigError` when a layer remembers every token and no length is given.
    """
    total: int = sum_over(model.stack, lambda layer: layer.kind.state_bytes(layer.options, model, length, element_bytes))
    return total
