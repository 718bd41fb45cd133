"""The cost of a layer over context ranks, by hand: Llama-3-8B heads, so one piece of slots is 8 x 64 x 257 x 4 = 526,336 bytes."""

import math
from dataclasses import replace

import pytest

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.hardware.measured import MeasuredTimes
from nha_megatron.hardware.network import Link, Network
from nha_megatron.layers.nha.context_parallel.time import LayerRates, composition_bytes, copied_bytes, nha_layer_cost
from nha_megatron.layers.nha.full.time import full_layer_ms

MODEL = ModelConfig(
    num_layers=1, hidden_size=4096, ffn_hidden_size=1, num_heads=32, num_kv_heads=8, head_dim=128, num_slots=64, vocab_size=1
)
PIECE = 526_336
HALO = 64 * 8 * 768  # 64 tokens x 8 heads x (2 x 128 bf16 channels and 64 fp32 log-gates)

# 1e8 bytes take 1 ms inside a node and 10 ms between two; hops 2 and 20 us, a start 5 us.
NETWORK = Network(inside=Link(100.0, 2.0), across=Link(10.0, 20.0), ranks_per_node=4, rails=4, start_us=5.0)
# 1 us a token of the operator, 0.1 us a token and 0.05 ms a call of the summary, a byte in 1e-12 s, 0.03 ms of small kernels.
RATES = LayerRates(MeasuredTimes((1000, 2000), (1.0, 2.0)), MeasuredTimes((1000, 2000), (0.15, 0.25)), 1.0, 0.03)
COPIED = 2 * 6144e-9  # ms a token: keys and values 8 x 256 x 2 bytes, log-gates 8 x 64 x 4, read and written


def test_times_between_and_beyond_what_was_measured():
    times = MeasuredTimes((10, 20, 40), (1.0, 3.0, 4.0))
    assert [times.at(x) for x in (10, 15, 20, 30, 40)] == pytest.approx([1.0, 2.0, 3.0, 3.5, 4.0])
    assert times.at(80) == pytest.approx(6.0)  # 0.05 a token, as between 20 and 40
    assert times.at(6) == pytest.approx(0.2) and times.at(0) == 0.0  # 0.2 a token, which reaches zero at 5


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_inside_a_node_passes_every_part_on(ranks):
    # One hop of 2 us and 1e6 bytes (0.01 ms) for each of the other ranks.
    assert NETWORK.all_gather_ms(1e6, ranks) == pytest.approx(0.005 + (ranks - 1) * (0.002 + 0.01))


@pytest.mark.parametrize(("rails", "gb_per_s"), [(4, 40.0), (2, 20.0), (1, 10.0)])
def test_a_ring_over_nodes_goes_at_the_pace_of_the_adapters_it_uses(rails, gb_per_s):
    # 12 ranks in three nodes: two hops of the eleven cross.
    given = replace(NETWORK, rails=rails).all_gather_ms(1e6, 12)
    assert given == pytest.approx(0.005 + 9 * 0.002 + 2 * 0.020 + 11 * 1.0 / gb_per_s)


def test_adapters_faster_than_the_links_inside_do_not_speed_a_ring_up():
    fast = replace(NETWORK, across=Link(1000.0, 2.0))
    assert fast.all_gather_ms(1e6, 8) == pytest.approx(0.005 + 7 * (0.002 + 0.01))


def test_doubling_sends_as_many_bytes_in_fewer_steps():
    # 1, 2 parts inside the node, 4 and then the missing 4 to other nodes.
    assert NETWORK.all_gather_ms(1e6, 12, "doubling") == pytest.approx(0.005 + 2 * 0.002 + 3 * 0.01 + 2 * 0.020 + 8 * 0.1)


def test_a_scan_takes_as_many_messages_as_the_ranks_have_bits():
    assert NETWORK.scan_ms(1e6, 4) == pytest.approx(2 * 0.017)  # inside the node: start 5 us, hop 2 us, bytes 10 us
    assert NETWORK.scan_ms(1e6, 12) == pytest.approx(4 * (0.005 + 0.020 + 0.1))  # some pair is always in two nodes
    assert NETWORK.scan_ms(1e6, 1) == NETWORK.scan_ms(0, 8) == 0.0


def test_neighbours_and_all_to_all_by_hand():
    assert NETWORK.neighbour_ms(1e6, 4) == pytest.approx(0.005 + 0.002 + 0.01)
    assert NETWORK.neighbour_ms(1e6, 5) == pytest.approx(0.005 + 0.020 + 0.1)
    assert NETWORK.all_to_all_ms(1e6, 4) == pytest.approx(0.005 + 0.002 + 0.01)
    # Three parts of seven stay in the node.
    assert NETWORK.all_to_all_ms(7e6, 8) == pytest.approx(0.005 + 0.020 + 0.03 + 0.4)


def test_nothing_is_sent_on_one_rank_or_without_bytes():
    for collective in (NETWORK.all_gather_ms, NETWORK.neighbour_ms, NETWORK.all_to_all_ms):
        assert collective(1e6, 1) == collective(0, 8) == 0.0


def test_bytes_that_pass_through_memory():
    # Keys and values 8 x 256 x 2 bytes a token, log-gates 8 x 64 x 4: read and written.
    assert copied_bytes(MODEL) == 2 * (4096 + 2048)
    assert copied_bytes(MODEL, element_bytes=4) == 2 * (8192 + 2048)
    # Of two ranks' single pieces only the first is used, as it is.
    assert composition_bytes(PIECE, 1, 2) == 2 * PIECE
    # Three passes. Eight ranks announce two: three compositions of 16 pieces, two of 8 gradients.
    assert composition_bytes(PIECE, 2, 8) == 3 * PIECE * (3 * 16 + 2 * 8)


def test_a_layer_over_two_ranks_by_hand():
    cost = nha_layer_cost(MODEL, 64, 2064, 2, RATES, NETWORK)
    assert cost.operator == pytest.approx(2.064)
    assert cost.summary == pytest.approx(0.25)  # of the 2000 tokens that are not the halo of the last rank
    assert cost.copies == pytest.approx(2064 * COPIED)
    assert cost.composition == pytest.approx(2 * PIECE * 1e-9)
    assert cost.small_kernels == 0.03
    # One message each way; that of the forward, 0.016 ms, travels during copies of 0.025 ms.
    assert cost.network == pytest.approx(0.007 + (PIECE + HALO) * 1e-8)
    parts = (cost.operator, cost.summary, cost.copies, cost.composition, cost.small_kernels, cost.network)
    assert cost.total == pytest.approx(sum(parts)) and cost.efficiency == pytest.approx(2.064 / sum(parts))


def test_a_layer_over_eight_ranks_by_hand():
    cost = nha_layer_cost(MODEL, 64, 2064, 8, RATES, NETWORK)
    assert cost.summary == pytest.approx(0.25 + (0.15 - 0.0936))  # the last 64 tokens, a call of their own
    ring = 0.005 + 6 * 0.002 + 0.020
    messages = 2 * ring + 7 * (3 * PIECE + 2 * HALO) / 40 * 1e-6  # two pieces and the halo; gradients of slots and halo
    assert cost.network == pytest.approx(messages - 2064 * COPIED)


def test_over_many_ranks_the_halo_is_a_message_of_its_own():
    # Packed, 14 of 16 ranks would get 393 kB for nothing: more than the 4 MiB that a message is worth.
    cost = nha_layer_cost(MODEL, 64, 2064, 16, RATES, NETWORK)
    ring = 0.005 + 12 * 0.002 + 3 * 0.020 + 15 * 1.5 * PIECE / 40 * 1e-6
    assert cost.network == pytest.approx(2 * (0.005 + 0.020 + HALO * 1e-7) + 2 * ring - 2064 * COPIED)


def test_without_a_window_there_is_one_piece_and_nothing_else_to_send():
    cost = nha_layer_cost(MODEL, 0, 2000, 4, RATES, NETWORK)
    assert cost.summary == pytest.approx(0.25)
    assert cost.network == pytest.approx(2 * (0.005 + 3 * (0.002 + PIECE * 1e-8)) - 2000 * COPIED)


def test_a_layer_on_one_rank_is_the_operator():
    cost = nha_layer_cost(MODEL, 64, 2000, 1, RATES, NETWORK)
    assert cost.total == pytest.approx(2.0) and cost.efficiency == 1.0


def test_longer_shards_hide_the_message_of_the_forward_and_no_more():
    short, long, longer = (nha_layer_cost(MODEL, 64, tokens, 16, RATES, NETWORK) for tokens in (1000, 100_000, 200_000))
    backward = 0.005 + 0.020 + HALO * 1e-7 + 0.005 + 12 * 0.002 + 3 * 0.020 + 15 * PIECE / 40 * 1e-6
    assert short.network > long.network == longer.network == pytest.approx(backward)
    assert short.composition == long.composition and short.efficiency < long.efficiency < longer.efficiency


def test_a_full_layer_by_heads_is_an_even_part_of_the_square_and_two_exchanges_each_way():
    times = MeasuredTimes((1000, 2000), (2.0, 8.0))
    # 8000 tokens: 16 times the work of 2000. Out of 2000 x (64 + 16) rows of 256 bytes, three quarters leave a rank.
    expected = 16 * 8.0 / 4 + 2 * (0.007 + 2000 * 80 * 256 * 3 / 4 * 1e-8)
    assert full_layer_ms(MODEL, 2000, 4, times, NETWORK) == pytest.approx(expected)
    assert full_layer_ms(MODEL, 1000, 1, times, NETWORK) == 2.0


def test_a_full_layer_by_gathered_keys_where_heads_do_not_divide():
    times = MeasuredTimes((1000, 2000), (2.0, 8.0))
    keys, halves = 1000 * 16 * 256, 2 * 500 * 32 * 256
    gathered = 0.005 + 2 * (0.002 + keys * 1e-8)
    returned = 0.007 + 2 * keys * 1e-8
    exchanged = 2 * (0.007 + halves * 1e-8)
    assert full_layer_ms(MODEL, 1000, 3, times, NETWORK) == pytest.approx(8.0 * 1.5**2 / 3 + gathered + returned + exchanged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(0.0, 1.0), "bandwidth .* is 0.0"),
        (lambda: Link(math.nan, 1.0), "bandwidth .* is nan"),
        (lambda: Link(1.0, -1.0), "latency .* is -1.0"),
        (lambda: replace(NETWORK, rails=5), "4 ranks in a node with 5 adapters"),
        (lambda: replace(NETWORK, ranks_per_node=0), "0 ranks in a node"),
        (lambda: replace(NETWORK, start_us=math.inf), "start of a collective is inf"),
        (lambda: NETWORK.all_gather_ms(1e6, 0), "over 0 ranks"),
        (lambda: NETWORK.all_to_all_ms(-1, 2), "-1 bytes"),
        (lambda: NETWORK.all_gather_ms(1e6, 2, "tree"), "'tree' is not known: choose ring or doubling"),
        (lambda: MeasuredTimes((1000,), (1.0,)), "at least two"),
        (lambda: MeasuredTimes((1000, 2000), (1.0,)), "one time for each"),
        (lambda: MeasuredTimes((2000, 1000), (1.0, 2.0)), "do not increase"),
        (lambda: MeasuredTimes((0, 1000), (1.0, 2.0)), "do not increase from one token on"),
        (lambda: MeasuredTimes((1000, 2000), (1.0, -2.0)), "measured time .* is -2.0"),
        (lambda: replace(RATES, copy_tb_per_s=0.0), "copy rate .* is 0.0"),
        (lambda: replace(RATES, small_kernels_ms=-1.0), "small kernels in ms is -1.0"),
        (lambda: nha_layer_cost(MODEL, 64, 0, 2, RATES, NETWORK), "2 ranks with 0 tokens"),
        (lambda: nha_layer_cost(MODEL, 64, 1000, 0, RATES, NETWORK), "0 ranks"),
        (lambda: nha_layer_cost(MODEL, 1001, 1000, 2, RATES, NETWORK), "window 1001 with 1000 tokens a rank"),
        (lambda: nha_layer_cost(MODEL, -1, 1000, 2, RATES, NETWORK), "window -1"),
        (lambda: full_layer_ms(MODEL, 0, 2, RATES.operator, NETWORK), "0 tokens each"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
