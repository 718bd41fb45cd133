"""How much device memory the fullest rank needs, before anything is started.

An estimate from sizes alone. Assumed:
- weights in the training precision, gradients in fp32;
- Adam's two moments in fp32, with bf16 an fp32 copy of the weights too, all sharded over data x context ranks (distributed optimizer);
- a fused attention operator that keeps its inputs, its output and the log-sum-exp, so that selective recomputation saves little; the
  `torch` backend keeps more, which selective recomputation then saves;
- `full` layers over context ranks keep what the exchange brought them: queries, and keys and values of the whole sequence (all_gather)
  or of whole sequences of some heads (a2a); selective recomputation fetches it again;
- under the DeepSpeed engine, sharded over the same ranks too: gradients from ZeRO stage 2 on, weights at stage 3. At stage 1 in bf16
  gradients exist in both precisions;
- 1F1B or interleaved micro batches in flight, as Megatron's schedules keep them;
- a loss that takes tokens a chunk at a time (model/chunked_loss.py): the logits of one chunk, and the gradients it has before the backward.
Not counted: communication buffers, layers whose weights ZeRO 3 has gathered, the allocator's fragmentation, the CUDA context, kernel
workspaces.
"""

from dataclasses import dataclass

from nha_megatron.config.engines import zero_settings
from nha_megatron.config.full_layers import kv_copies
from nha_megatron.config.model import ModelConfig
from nha_megatron.config.parallel import ParallelConfig
from nha_megatron.config.run import RunConfig

from . import arithmetic


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of one pipeline stage (`stage` counts from 0)."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def estimate_memory(config: RunConfig, world_size: int) -> RankMemory:
    """Memory of the fullest rank. Raises `ConfigError` when the world does not fit."""
    stages = [_stage_memory(config, world_size, stage) for stage in range(config.parallel.pipeline)]
    return max(stages, key=lambda memory: memory.total)


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Weights that one rank of a pipeline stage holds."""
    replicated = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm == "rms" else 0)
    layer = (arithmetic.layer_parameters(model) - replicated) // parallel.tensor + replicated
    matrix = model.padded_vocab_size * model.hidden_size // parallel.tensor
    first, last = stage == 0, stage == parallel.pipeline - 1
    count = model.num_layers // parallel.pipeline * layer
    count += matrix if first else 0
    if last:
        # A tied output matrix is the embedding itself on one stage, and a second copy of it on another.
        count += model.hidden_size + (0 if model.tie_embeddings and first else matrix)
    return count


def layer_activation_bytes(config: RunConfig, recompute: str) -> int:
    """Bytes that one layer keeps for the backward of one micro batch."""
    model, parallel = config.model, config.parallel
    element = _element_bytes(config)
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.context
    residual_tokens = tokens // parallel.tensor if parallel.sequence else tokens
    if recompute == "full":
        return residual_tokens * model.hidden_size * element  # the input of the layer

    residual = 4 * model.hidden_size * element  # inputs and outputs of both norms
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    gates = model.num_kv_heads * model.num_slots
    sharded = (query + 2 * key_value) * element + 2 * gates * arithmetic.STATE_BYTES  # q, k, v; gate logits and log-gates
    sharded += 3 * model.ffn_hidden_size * element  # gate, up and the product (model/mlp.py)
    sharded += query * element  # output of the operator
    if model.qk_norm == "rms":
        sharded += (query + key_value) * element
    if model.value_activation == "silu":
        sharded += (query + 2 * key_value) * element  # its input is a part of the projections' output, which is kept whole
    if model.output_norm == "rms":
        sharded += 2 * query * element  # SiLU of the output, and its norm
    if recompute == "none":
        sharded += model.num_heads * 4  # log-sum-exp
    return residual_tokens * residual + tokens * sharded // parallel.tensor


def exchanged_bytes(config: RunConfig) -> int:
    """Bytes that a `full` layer keeps for the backward beside those of any layer, because its context ranks exchange; 0 without ranks."""
    if config.full_layer_exchange is None:
        return 0
    model, parallel = config.model, config.parallel
    heads, kv_heads = model.num_heads // parallel.tensor, model.num_kv_heads // parallel.tensor
    ranks = parallel.context
    if config.full_layer_exchange[0] == "a2a":
        rows = heads + 2 * kv_heads * kv_copies(heads, kv_heads, ranks)
    else:
        rows = heads + 2 * kv_heads * ranks
    tokens = config.training.micro_batch_size * config.data.sequence_length // ranks
    return tokens * rows * model.head_dim * _element_bytes(config)


def head_bytes(config: RunConfig) -> int:
    """Bytes of the loss on the last stage: logits of a chunk of tokens, gradients of all hidden states and of the output matrix."""
    model, parallel = config.model, config.parallel
    element = _element_bytes(config)
    # bf16 logits and gradients stand beside their fp32 form; in fp32 there is only one.
    copies = 4 if element == 4 else 4 + element
    columns = model.padded_vocab_size // parallel.tensor
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.context
    logits = min(tokens, arithmetic.logit_chunk_tokens(columns)) * columns * copies
    hidden = (tokens // parallel.tensor if parallel.sequence else tokens) * model.hidden_size * element
    return logits + hidden + columns * model.hidden_size * copies


def _stage_memory(config: RunConfig, world_size: int, stage: int) -> RankMemory:
    model, parallel, training = config.model, config.parallel, config.training
    element = _element_bytes(config)
    parameters = rank_parameters(model, parallel, stage)
    shards = config.check_world(world_size) * parallel.context
    state = 8 if training.precision == "fp32" else 12
    zero = zero_settings(training)
    stage_of_zero = 1 if zero is None else zero.stage
    gradient = 6 if zero is not None and zero.stage == 1 and training.precision == "bf16" else 4

    passes = _passes_in_flight(config, world_size, stage)
    layers = model.num_layers // (parallel.pipeline * (parallel.virtual_pipeline or 1))
    recomputed = 0 if training.recompute == "none" else training.recompute_layers or layers
    activations = passes * recomputed * layer_activation_bytes(config, training.recompute)
    activations += passes * (layers - recomputed) * layer_activation_bytes(config, "none")
    activations += passes * _full_layers(config, stage, recomputed) * exchanged_bytes(config)
    if recomputed:  # the layer that is being computed again
        activations += layer_activation_bytes(config, "none") + (exchanged_bytes(config) if _full_layers(config, stage) else 0)
    last = stage == parallel.pipeline - 1
    return RankMemory(
        stage=stage,
        weights=parameters * element // (shards if stage_of_zero == 3 else 1),
        gradients=parameters * gradient // (shards if stage_of_zero >= 2 else 1),
        optimizer=parameters * state // shards,
        activations=activations,
        head=head_bytes(config) if last else 0,
    )


def _passes_in_flight(config: RunConfig, world_size: int, stage: int) -> int:
    """Passes of a micro batch through a model chunk whose backward has not run yet, at the fullest moment of the schedule."""
    parallel, micro_batches = config.parallel, config.micro_batches(world_size)
    chunks = parallel.virtual_pipeline or 1
    after = parallel.pipeline - stage - 1
    passes = after + 1 if chunks == 1 else 2 * after + (chunks - 1) * parallel.pipeline + 1
    return min(passes, micro_batches * chunks)


def _full_layers(config: RunConfig, stage: int, first: int = 0) -> int:
    """`full` layers, from layer `first` of a chunk on, of the chunk of this pipeline stage that has most of them."""
    parallel, windows = config.parallel, config.model.windows
    chunks = parallel.virtual_pipeline or 1
    layers = len(windows) // (parallel.pipeline * chunks)
    begins = [(chunk * parallel.pipeline + stage) * layers for chunk in range(chunks)]
    return max(windows[begin + first : begin + layers].count(None) for begin in begins)


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else 4
