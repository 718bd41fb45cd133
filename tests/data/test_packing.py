"""Best-fit packing: what an epoch holds, how documents lie in samples, and how little stays empty."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_megatron.data import packing
from nha_megatron.data.batch import make_batch
from nha_megatron.data.order import open_samples
from nha_megatron.data.packing import PADDING, PackedOrder, best_fit_decreasing
from nha_megatron.data.reader import BatchReader
from nha_megatron.data.token_files import TokenFile
from tests.data.token_file_cases import END_OF_TEXT, numbered_documents, run_config, write_token_file

# Shorter than a sample, as long with and without end-of-text, and several samples long with every kind of rest.
LENGTHS = [0, 1, 2, 3, 9, 10, 11, 12, 13, 5, 0, 22, 23, 24, 25, 40, 4, 6, 7]
LENGTH = 12


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    write_token_file(tmp_path / "c", numbered_documents(LENGTHS))
    return str(tmp_path / "c")


def pack(corpus: str, length: int = LENGTH, key: int = 1) -> PackedOrder:
    return PackedOrder(TokenFile(corpus), length, key)


def epoch_of(order: PackedOrder, epoch: int = 0) -> list[np.ndarray]:
    return [order.sample(epoch * order.samples_per_epoch + i) for i in range(order.samples_per_epoch)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_bins_hold_every_item_once_and_two_never_fit_in_one(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    fill = sorted(sum(lengths[item] for item in items) for items in bins)
    assert all(items == sorted(items) for items in bins) and (not fill or fill[-1] <= 20)
    # Else the items of the later one would have gone into the earlier one.
    assert len(fill) < 2 or fill[0] + fill[1] > 20


def test_the_fullest_bin_with_room_is_taken() -> None:
    # 7, 6 and 4 open bins; 3 fits all of them, exactly into that of 7; 4 into that of 6.
    assert best_fit_decreasing([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert best_fit_decreasing([], 10) == []


@pytest.mark.parametrize("length", [1, 2, 7, LENGTH, 1000])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("block", [3, 2**14])
def test_an_epoch_shows_every_token_once(corpus: str, length: int, epoch: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BLOCK_DOCUMENTS", block)
    monkeypatch.setattr(packing, "_BLOCK_SAMPLES", 0)
    samples = np.stack(epoch_of(pack(corpus, length), epoch))
    batch = make_batch(samples, END_OF_TEXT, isolate_documents=True)
    inputs = Counter(samples[:, :-1].flatten().tolist())
    del inputs[PADDING]
    expected = Counter(token for document in numbered_documents(LENGTHS) for token in [*document, END_OF_TEXT])
    assert inputs == expected
    # Counted labels: each document's tokens but the first, and its end-of-text if there is something before it.
    labels = Counter(batch.labels[batch.loss_mask == 1].tolist())
    assert labels == Counter(
        token for document in numbered_documents(LENGTHS) for token in [*document[1:], *[END_OF_TEXT] * bool(document)]
    )


def test_only_documents_longer_than_a_sample_are_split(corpus: str) -> None:
    documents = [(*document, END_OF_TEXT) for document in numbered_documents(LENGTHS)]
    pieces: Counter[tuple[int, ...]] = Counter()
    for sample in epoch_of(pack(corpus)):
        (cut,) = [make_batch(sample[None], END_OF_TEXT, isolate_documents=True).cu_seqlens]
        assert cut is not None
        inputs = sample[:-1]
        pieces.update(tuple(inputs[a:b].tolist()) for a, b in pairwise(cut.tolist()) if inputs[a] != PADDING)
    wanted = [document[i : i + LENGTH] for document in documents for i in range(0, len(document), LENGTH)]
    assert pieces == Counter(wanted)


def test_padding_is_one_document_without_loss() -> None:
    samples = np.array([[5, 6, 0, PADDING, PADDING, PADDING], [7, 0, 0, 8, 0, PADDING], [1, 2, 3, 4, 5, 6]])
    batch = make_batch(samples, END_OF_TEXT, isolate_documents=True)
    assert batch.tokens.tolist() == [[5, 6, 0, 0, 0], [7, 0, 0, 8, 0], [1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[6, 0, 0, 0, 0], [0, 0, 8, 0, 0], [2, 3, 4, 5, 6]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 3, 5, 7, 8, 10, 15]


def test_pure_function_of_seed_and_index(corpus: str) -> None:
    order, again = pack(corpus), pack(corpus)
    per_epoch = order.samples_per_epoch
    indexes = [977, 3, 10**9, 0, per_epoch - 1, per_epoch, 2**40]  # epochs out of order, and far ones
    expected = {index: order.sample(index).tolist() for index in indexes}
    assert all(again.sample(index).tolist() == expected[index] for index in reversed(indexes))
    first, second = ([sample.tolist() for sample in epoch_of(order, epoch)] for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)  # the same samples in another order
    assert sorted(sample.tolist() for sample in epoch_of(pack(corpus, key=2))) != sorted(first)


def test_an_index_far_away_reads_one_sample_and_packs_nothing(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = pack(corpus)
    read = order.tokens.read
    counts = []

    def counting(document: int, start: int, count: int) -> np.ndarray:
        counts.append(count)
        return read(document, start, count)

    monkeypatch.setattr(order.tokens, "read", counting)
    monkeypatch.setattr(packing, "best_fit_decreasing", None)
    order.sample(2**50)
    assert 0 < sum(counts) <= LENGTH + 1


def test_order_never_changes(corpus: str) -> None:
    """Numbers written down once: a run must resume with the same data after any update."""
    order = pack(corpus)
    assert [order.sample(i).tolist() for i in (0, 1, 1000)] == EXPECTED_SAMPLES


@pytest.mark.parametrize(("length", "most"), [(2048, 0.01), (8192, 0.01), (65536, 0.02)])
def test_padding_is_small_for_the_lengths_of_web_documents(tmp_path: Path, length: int, most: float) -> None:
    """Log-normal lengths, median 400 and mean 1,100 tokens as in crawled text: many short documents fill what long ones leave."""
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.4, 20_000).astype(int)
    write_token_file(tmp_path / "c", [[1] * int(n) for n in lengths])
    order = pack(str(tmp_path / "c"), length)
    places = order.samples_per_epoch * length
    assert order.padding_share == pytest.approx((places - order.tokens.num_tokens) / places)
    assert order.padding_share < most


def test_the_share_of_padding_of_a_blend(tmp_path: Path) -> None:
    for name, documents in (("a", [[1] * 8]), ("b", [[1] * 11])):  # 9 of 12 places, and all
        write_token_file(tmp_path / name, documents)
    entries = [{"path": str(tmp_path / "a"), "weight": 1.0}, {"path": str(tmp_path / "b"), "weight": 3.0}]
    data = {"sequence_length": LENGTH, "seed": 0}
    assert open_samples(run_config(entries, packing="best_fit", **data).data, "train").padding_share == pytest.approx(0.25 / 4)
    assert open_samples(run_config(str(tmp_path / "b"), sequence_length=6).data, "train").padding_share == 0


@pytest.mark.parametrize(("dp_size", "cp_size", "micro"), [(1, 1, 8), (2, 1, 2), (4, 2, 1), (1, 4, 4), (2, 12, 2)])
def test_every_layout_reads_the_same_step(corpus: str, dp_size: int, cp_size: int, micro: int) -> None:
    config = run_config(corpus, sequence_length=LENGTH, packing="best_fit", micro=micro, batch=8)
    order = open_samples(config.data, "train")
    step = 5
    whole = make_batch(np.stack([order.sample(step * 8 + row) for row in range(8)]), END_OF_TEXT, isolate_documents=True)
    ranks = [[BatchReader(order, config, dp, dp_size, cp, cp_size, prefetch=False) for cp in range(cp_size)] for dp in range(dp_size)]
    batches = [[reader.micro_batches(step) for reader in group] for group in ranks]
    # Row by row of micro batches, over the data ranks: the order of the global index.
    order_of_rows = [(number, dp) for number in range(8 // (micro * dp_size)) for dp in range(dp_size)]
    for name in ("tokens", "labels", "loss_mask"):
        joined = [torch.cat([getattr(batches[dp][cp][number], name) for cp in range(cp_size)], 1) for number, dp in order_of_rows]
        assert torch.equal(torch.cat(joined), getattr(whole, name))
    # Boundaries of all ranks' rows laid end to end.
    boundaries = {0}
    for place, (number, dp) in enumerate(order_of_rows):
        shards = [batches[dp][cp][number].cu_seqlens for cp in range(cp_size)]
        assert all(shard is not None and torch.equal(shard, shards[0]) for shard in shards)  # type: ignore[arg-type]
        boundaries |= {place * micro * LENGTH + boundary for boundary in shards[0].tolist()}  # type: ignore[union-attr]
    assert whole.cu_seqlens is not None and sorted(boundaries) == whole.cu_seqlens.tolist()


EXPECTED_SAMPLES = [
    [4, 5, 6, 0, 211, 212, 213, 214, 215, 216, 217, 0, PADDING],
    [62, 63, 64, 65, 66, 0, 0, 201, 202, 203, 204, 0, PADDING],
    [161, 162, 163, 164, 165, 166, 167, 168, 169, 170, 171, 172, 173],
]
