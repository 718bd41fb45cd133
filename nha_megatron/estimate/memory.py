"""How much device memory the fullest rank needs, before anything is started.

An estimate from sizes alone. Assumed:
- weights in the training precision, gradients in fp32;
- Adam's two moments in fp32, with bf16 an fp32 copy of the weights too, all sharded over data x context ranks (distributed optimizer);
- what an attention layer keeps, its exchange over context ranks included, as its kind says (`LayerKind.kept_bytes`);
- under the DeepSpeed engine, sharded over the same ranks too: gradients from ZeRO stage 2 on, weights at stage 3. At stage 1 in bf16
  gradients exist in both precisions;
- 1F1B or interleaved micro batches in flight, as Megatron's schedules keep them;
- a loss that takes tokens a chunk at a time (model/chunked_loss.py): the logits of one chunk, and the gradients it has before the backward;
- the backward of one layer, whose widest moment is that of the MLP's activation. The loss is over by then: the larger of the two counts.
tests/estimate/test_measured.py holds it to what training runs needed.
Not counted: communication buffers, layers whose weights ZeRO 3 has gathered, the allocator's fragmentation, the CUDA context, kernel
workspaces.
"""

from dataclasses import dataclass

from nha_megatron.config.engines import zero_settings
from nha_megatron.config.model import ModelConfig
from nha_megatron.config.parallel import ParallelConfig
from nha_megatron.config.run import RunConfig
from nha_megatron.estimate import counts
from nha_megatron.estimate.logits import logit_chunk_tokens
from nha_megatron.layers.pattern import Layer, sum_over


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of one pipeline stage, which counts from 0."""

    pipeline_stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    """Output matrix and loss, in the forward."""
    layer_backward: int
    """What the backward of one layer needs beside what was kept for it."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + max(self.head, self.layer_backward)


def estimate_memory(config: RunConfig, world_size: int) -> RankMemory:
    """Memory of the fullest rank. Raises `ConfigError` when the world does not fit."""
    ranks = [_rank_memory(config, world_size, stage) for stage in range(config.parallel.pipeline)]
    return max(ranks, key=lambda memory: memory.total)


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, pipeline_stage: int) -> int:
    """Weights that one rank of a pipeline stage holds."""

    def of_layer(layer: Layer) -> int:
        replicated = counts.replicated_parameters(model, layer)
        return (counts.layer_parameters(model, layer) - replicated) // parallel.tensor + replicated

    matrix = model.padded_vocab_size * model.hidden_size // parallel.tensor
    first, last = pipeline_stage == 0, pipeline_stage == parallel.pipeline - 1
    count: int = sum(sum_over(chunk, of_layer) for chunk in model_chunks(model, parallel, pipeline_stage))
    count += matrix if first else 0
    if last:
        # A tied output matrix is the embedding itself on one stage, and a second copy of it on another.
        count += model.hidden_size + (0 if model.tie_embeddings and first else matrix)
    return count


def model_chunks(model: ModelConfig, parallel: ParallelConfig, pipeline_stage: int) -> list[tuple[Layer, ...]]:
    """The layers of each model chunk of a pipeline stage: one chunk, or `virtual_pipeline` of them when interleaved."""
    chunks = parallel.virtual_pipeline or 1
    size = model.num_layers // (parallel.pipeline * chunks)
    begins = [(chunk * parallel.pipeline + pipeline_stage) * size for chunk in range(chunks)]
    return [model.stack[begin : begin + size] for begin in begins]


def layer_activation_bytes(config: RunConfig, layer: Layer, recompute: str) -> int:
    """Bytes that one layer keeps for the backward of one micro batch."""
    model, rank = config.model, config.rank_shape
    residual_tokens = rank.tokens // rank.tensor if rank.sequence_parallel else rank.tokens
    if recompute == "full":
        return residual_tokens * model.hidden_size * rank.element_bytes  # the input of the layer
    residual = 4 * model.hidden_size * rank.element_bytes  # inputs and outputs of both norms
    mlp = 3 * model.ffn_hidden_size * rank.element_bytes  # gate, up and the product (model/mlp.py)
    attention = layer.kind.kept_bytes(layer.options, model, rank, recompute == "selective")
    return residual_tokens * residual + rank.tokens * mlp // rank.tensor + attention


def head_bytes(config: RunConfig) -> int:
    """Bytes of the loss on the last pipeline stage: logits of a chunk of tokens, gradients of hidden states and of the output matrix."""
    model, rank = config.model, config.rank_shape
    element = rank.element_bytes
    # bf16 logits and gradients stand beside their fp32 form; in fp32 there is only one.
    copies = 4 if element == 4 else 4 + element
    columns = model.padded_vocab_size // rank.tensor
    logits = min(rank.tokens, logit_chunk_tokens(columns)) * columns * copies
    hidden = (rank.tokens // rank.tensor if rank.sequence_parallel else rank.tokens) * model.hidden_size * element
    return logits + hidden + columns * model.hidden_size * copies


def layer_backward_bytes(config: RunConfig) -> int:
    """Bytes of the backward of one layer at its widest moment, beside what was kept for it.

    When the MLP's activation is differentiated there are the gradients of its product and of [gate | up], one temporary of its width, and
    the gradient of the residual stream; the product itself has gone.
    """
    model, rank = config.model, config.rank_shape
    residual_tokens = rank.tokens // rank.tensor if rank.sequence_parallel else rank.tokens
    mlp = (1 + 2 + 1 - 1) * model.ffn_hidden_size * rank.element_bytes
    return rank.tokens * mlp // rank.tensor + residual_tokens * model.hidden_size * rank.element_bytes


def _rank_memory(config: RunConfig, world_size: int, pipeline_stage: int) -> RankMemory:
    model, parallel, training = config.model, config.parallel, config.training
    parameters = rank_parameters(model, parallel, pipeline_stage)
    shards = config.check_world(world_size) * parallel.context
    state = 8 if training.precision == "fp32" else 12
    zero = zero_settings(training)
    zero_stage = 1 if zero is None else zero.stage
    gradient = 6 if zero is not None and zero.stage == 1 and training.precision == "bf16" else 4
    return RankMemory(
        pipeline_stage=pipeline_stage,
        weights=parameters * config.rank_shape.element_bytes // (shards if zero_stage == 3 else 1),
        gradients=parameters * gradient // (shards if zero_stage >= 2 else 1),
        optimizer=parameters * state // shards,
        activations=_activations(config, world_size, pipeline_stage),
        head=head_bytes(config) if pipeline_stage == parallel.pipeline - 1 else 0,
        layer_backward=layer_backward_bytes(config),
    )


def _activations(config: RunConfig, world_size: int, pipeline_stage: int) -> int:
    training = config.training
    chunks = model_chunks(config.model, config.parallel, pipeline_stage)
    recomputed = 0 if training.recompute == "none" else training.recompute_layers or len(chunks[0])

    def kept(chunk: tuple[Layer, ...]) -> int:
        first = sum_over(chunk[:recomputed], lambda layer: layer_activation_bytes(config, layer, training.recompute))
        others: int = sum_over(chunk[recomputed:], lambda layer: layer_activation_bytes(config, layer, "none"))
        return first + others

    total = _passes_in_flight(config, world_size, pipeline_stage) * max(kept(chunk) for chunk in chunks)
    if recomputed:  # the layer that is being computed again
        total += max(layer_activation_bytes(config, layer, "none") for chunk in chunks for layer in set(chunk))
    return total


def _passes_in_flight(config: RunConfig, world_size: int, pipeline_stage: int) -> int:
    """Passes of a micro batch through a model chunk whose backward has not run yet, at the fullest moment of the schedule."""
    parallel, micro_batches = config.parallel, config.micro_batches(world_size)
    chunks = parallel.virtual_pipeline or 1
    after = parallel.pipeline - pipeline_stage - 1
    passes = after + 1 if chunks == 1 else 2 * after + (chunks - 1) * parallel.pipeline + 1
    return min(passes, micro_batches * chunks)
