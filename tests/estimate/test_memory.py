"""The memory estimate: exact where it only counts, and moving the right way where it estimates."""

import pytest

from nha_megatron.estimate import memory
from nha_megatron.estimate.counts import num_parameters
from nha_megatron.estimate.memory import estimate_memory, rank_parameters
from nha_megatron.layers.nha.full.cost import received_bytes
from tests.config.cases import run


def layer_activation_bytes(config, recompute):
    """Of the first layer."""
    return memory.layer_activation_bytes(config, config.model.stack[0], recompute)


def exchanged_bytes(config):
    """What a `full` layer keeps beside those of any layer, because its context ranks exchange."""
    return received_bytes(config.model, config.exchanges["full"][0], config.rank_shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_the_stages_hold_the_model_together(pipeline, tied):
    config = run(model={"tie_embeddings": tied}, parallel={"pipeline": pipeline})
    held = sum(rank_parameters(config.model, config.parallel, stage) for stage in range(pipeline))
    # A tied matrix is needed on the first and on the last stage.
    copies = config.model.padded_vocab_size * config.model.hidden_size if tied and pipeline > 1 else 0
    assert held == num_parameters(config.model) + copies


def test_tensor_ranks_share_matrices_and_repeat_norms():
    one, two = run(), run(parallel={"tensor": 2})
    # Per block two norms of 64 channels, and the final norm; the output norm is split with its heads.
    norms = 4 * 2 * 64 + 64
    assert 2 * rank_parameters(two.model, two.parallel, 0) == rank_parameters(one.model, one.parallel, 0) + norms


def test_weights_gradients_and_optimizer_state_by_hand():
    parameters = num_parameters(run().model)
    plain = estimate_memory(run(), 1)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    # bf16 weights, fp32 gradients, an fp32 copy and two moments shared by 2 data x 2 context ranks.
    sharded = estimate_memory(run(training={"precision": "bf16"}, parallel={"context": 2}), 4)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (2 * parameters, 4 * parameters, 3 * parameters)


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    # Bytes a parameter of weights, gradients and optimizer state; 4 ranks share what the stage shards.
    [
        (1, "fp32", (4, 4, 8 / 4)),
        (2, "fp32", (4, 4 / 4, 8 / 4)),
        (3, "fp32", (4 / 4, 4 / 4, 8 / 4)),
        (1, "bf16", (2, 2 + 4, 12 / 4)),
        (2, "bf16", (2, 4 / 4, 12 / 4)),
        (3, "bf16", (2 / 4, 4 / 4, 12 / 4)),
    ],
)
def test_what_a_stage_of_zero_shards(stage, precision, expected):
    settings = {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}, "precision": precision}
    estimate = estimate_memory(run(training=settings, parallel={"context": 2}), 4)
    parameters = num_parameters(run().model)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == tuple(count * parameters for count in expected)


def test_recomputation_keeps_less():
    none, selective, full = (layer_activation_bytes(run(), recompute) for recompute in ("none", "selective", "full"))
    assert none > selective > full == 2 * 128 * 64 * 4  # the input of the layer: 2 sequences of 128 tokens, 64 channels, fp32


def test_layers_that_are_not_recomputed_keep_everything():
    none, full = (layer_activation_bytes(run(), recompute) for recompute in ("none", "full"))
    every, first = (estimate_memory(run(training={"recompute": "full", "recompute_layers": count}), 1).activations for count in (None, 3))
    assert every == 4 * full + none  # and the layer that is being computed again
    assert first == 3 * full + none + none
    # A `full` layer that is not recomputed also keeps what the exchange brought it.
    sections = {"model": HYBRID, "parallel": TWO_RANKS}
    kept, again = (estimate_memory(run(training={"recompute": "full", "recompute_layers": n}, **sections), 2).activations for n in (3, 4))
    assert kept - again == none // 2 - full // 2 + exchanged_bytes(run(**sections))


def test_context_ranks_divide_the_activations():
    whole, shard = run(), run(parallel={"context": 4})
    assert layer_activation_bytes(whole, "none") == 4 * layer_activation_bytes(shard, "none")


def test_the_head_by_hand():
    # 2 rows of 128 tokens on each of 2 context ranks are less than a chunk; 50,000 tokens are padded to 50,048 columns.
    small = run(model={"vocab_size": 50_000}, parallel={"context": 2})
    assert estimate_memory(small, 2).head == 4 * (2 * 64 * 50_048 + 2 * 64 * 64 + 50_048 * 64)
    # bf16: logits and the gradient of the matrix also in fp32, 25,024 columns on each of two tensor ranks.
    split = run(model={"vocab_size": 50_000}, parallel={"tensor": 2}, training={"precision": "bf16"})
    assert estimate_memory(split, 2).head == 6 * (2 * 128 * 25_024 + 25_024 * 64) + 2 * 2 * 128 * 64
    # The first of two stages has no head, and is not the fullest one.
    assert estimate_memory(run(model={"vocab_size": 50_000}, parallel={"pipeline": 2}), 2).pipeline_stage == 1


def test_logits_do_not_grow_with_the_sequence():
    sections = {"model": {"vocab_size": 128_000}, "training": {"precision": "bf16", "micro_batch_size": 1, "global_batch_size": 1}}
    at_8k, at_128k = (estimate_memory(run(data={"sequence_length": length}, **sections), 1).head for length in (2**13, 2**17))
    # Only the gradient of the hidden states does: 64 channels in bf16.
    assert at_128k - at_8k == (2**17 - 2**13) * 64 * 2
    assert at_128k < 2**29


def activations(**sections):
    return estimate_memory(run(**sections), 2).activations


HYBRID, WINDOWS = {"window": "16*3,full"}, {"window": 16}
TWO_RANKS = {"context": 2}


def test_full_layers_keep_what_their_context_ranks_exchange():
    """4 query and 2 KV heads of 16 channels, 2 rows of 128 tokens over 2 ranks, fp32, one full layer."""
    row = 2 * 64 * 16 * 4
    for exchange, heads in (
        ("all_gather", 4 + 2 * 2 * 2),  # its queries' place, and keys and values of both shards
        ("a2a", 4 + 2 * 2),  # queries, keys and values of half of the heads, twice the tokens
    ):
        parallel = {**TWO_RANKS, "cp_comm_type": exchange}
        assert activations(model=HYBRID, parallel=parallel) - activations(model=WINDOWS, parallel=TWO_RANKS) == heads * row
        # Computed again, it is there for one layer at a time.
        recomputed = {"training": {"recompute": "selective"}}
        more = activations(model={"window": "full"}, parallel=parallel, **recomputed) - activations(
            model=WINDOWS, parallel=TWO_RANKS, **recomputed
        )
        assert more == heads * row
        every_layer = activations(model={"window": "full"}, parallel=parallel) - activations(model=WINDOWS, parallel=TWO_RANKS)
        assert every_layer == 4 * heads * row
    # Without context ranks nothing is exchanged.
    assert estimate_memory(run(model=HYBRID), 1).activations == estimate_memory(run(model=WINDOWS), 1).activations


def test_gathered_keys_grow_with_the_whole_sequence():
    sections = {"model": HYBRID, "parallel": {**TWO_RANKS, "cp_comm_type": "all_gather"}}
    halves = [exchanged_bytes(run(data={"sequence_length": length}, **sections)) for length in (128, 256)]
    assert halves[1] == 2 * halves[0]
    # Twice the ranks for twice the tokens: shards as before, and keys and values of twice as many.
    longer = exchanged_bytes(run(data={"sequence_length": 256}, model=HYBRID, parallel={"context": 4, "cp_comm_type": "all_gather"}))
    assert longer - halves[0] == 2 * 2 * 2 * (2 * 64 * 16 * 4)


def test_the_stage_with_the_full_layers_is_the_fullest():
    sections = {"model": {"window": "16*3,full", "vocab_size": 1}, "data": {"sequence_length": 4096}}
    sections["parallel"] = {"context": 2, "pipeline": 4, "cp_comm_type": "all_gather"}
    sections["training"] = {"global_batch_size": 2}  # one micro batch, so that no stage has several in flight
    assert estimate_memory(run(**sections), 8).pipeline_stage == 3


def test_sequence_parallelism_divides_what_tensor_parallelism_repeats():
    one, split = run(), run(parallel={"tensor": 2, "sequence": True})
    assert layer_activation_bytes(one, "none") == 2 * layer_activation_bytes(split, "none")
    repeated = run(parallel={"tensor": 2})
    assert layer_activation_bytes(repeated, "none") > layer_activation_bytes(split, "none")


def test_the_first_stage_keeps_the_most_micro_batches():
    # 1F1B: stage 0 of 4 runs 4 forwards before its first backward; 4 micro batches of 1 layer each.
    config = run(parallel={"pipeline": 4}, model={"vocab_size": 1, "ffn_hidden_size": 1024})
    fullest = estimate_memory(config, 4)
    assert fullest.pipeline_stage == 0
    assert fullest.activations == 4 * layer_activation_bytes(config, "none")
    # Interleaved, 2 stages of 2 chunks: stage 0 runs 2 x 1 + 1 x 2 + 1 = 5 passes of a chunk of 1 layer.
    interleaved = run(parallel={"pipeline": 2, "virtual_pipeline": 2}, model={"vocab_size": 1, "ffn_hidden_size": 1024})
    assert estimate_memory(interleaved, 2).activations == 5 * layer_activation_bytes(interleaved, "none")
    # One micro batch cannot be in flight twice.
    single = run(parallel={"pipeline": 4}, training={"global_batch_size": 2}, model={"vocab_size": 1, "ffn_hidden_size": 1024})
    assert estimate_memory(single, 4).activations == layer_activation_bytes(single, "none")
