"""Batches: labels, mask, boundaries, and that every layout of ranks reads the same tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nha_megatron.config import ConfigError, OneRankError
from nha_megatron.data.batch import Batch, document_boundaries, make_batch
from nha_megatron.data.order import SampleOrder, open_samples
from nha_megatron.data.reader import BatchReader
from tests.data.token_file_cases import END_OF_TEXT, numbered_documents, run_config, write_token_file

LENGTH = 24  # tokens of a sample: divides by every context-parallel size below


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    write_token_file(tmp_path / "c", numbered_documents([1, 0, 3, 40, 2, 7, 0, 0, 5, 90, 12, 9]))
    return str(tmp_path / "c")


def reader(
    corpus: str, dp: tuple[int, int] = (0, 1), cp: tuple[int, int] = (0, 1), *, packing: str = "concat", micro: int = 1
) -> BatchReader:
    config = run_config(corpus, sequence_length=LENGTH, packing=packing, micro=micro, batch=8)
    return BatchReader(open_samples(config.data, "train"), config, *dp, *cp, prefetch=False)


def test_labels_mask_and_boundaries() -> None:
    samples = np.array([[5, 0, 6, 7, 8], [9, 1, 2, 0, 3]])
    batch = make_batch(samples, END_OF_TEXT, isolate_documents=True)
    assert batch.tokens.tolist() == [[5, 0, 6, 7], [9, 1, 2, 0]]
    assert batch.labels.tolist() == [[0, 6, 7, 8], [1, 2, 0, 3]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 1], [1, 1, 1, 0]]  # predicting end-of-text counts, what follows it does not
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 2, 4, 8]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
        torch.int32,
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([[1, 2, 3]], [0, 3]),
        ([[1, 2, 0]], [0, 3]),
        ([[0, 1, 2]], [0, 1, 3]),
        ([[0, 0, 0]], [0, 1, 2, 3]),
        ([[1, 2], [3, 4]], [0, 2, 4]),
        ([[1, 0], [0, 4]], [0, 2, 3, 4]),
        ([[7]], [0, 1]),
        ([[0], [0]], [0, 1, 2]),
    ],
)
def test_document_boundaries(tokens: list[list[int]], expected: list[int]) -> None:
    assert document_boundaries(np.array(tokens), END_OF_TEXT).tolist() == expected


def test_no_boundaries_when_attention_crosses_documents(corpus: str) -> None:
    assert all(batch.cu_seqlens is None for batch in reader(corpus, packing="none").micro_batches(0))


def test_sequence_length_one(corpus: str) -> None:
    config = run_config(corpus, sequence_length=1, packing="concat", micro=4, batch=4)
    (batch,) = BatchReader(open_samples(config.data, "train"), config, 0, 1, prefetch=False).micro_batches(3)
    assert batch.tokens.shape == batch.labels.shape == (4, 1)
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 1, 2, 3, 4]
    assert batch.loss_mask[:, 0].tolist() == [float(token != END_OF_TEXT) for token in batch.tokens[:, 0].tolist()]


def assemble(corpus: str, step: int, dp_size: int, cp_size: int, micro: int) -> dict[str, torch.Tensor]:
    """The whole step [8, LENGTH], put together from what every rank reads, in the order of the global sample index."""
    rows: dict[str, list[torch.Tensor]] = {"tokens": [], "labels": [], "loss_mask": []}
    parts = [
        [reader(corpus, (dp, dp_size), (cp, cp_size), micro=micro).micro_batches(step) for cp in range(cp_size)] for dp in range(dp_size)
    ]
    for number in range(8 // (micro * dp_size)):
        for dp in range(dp_size):
            shards: list[Batch] = [parts[dp][cp][number] for cp in range(cp_size)]
            for name, values in rows.items():
                values.append(torch.cat([getattr(shard, name) for shard in shards], dim=1))
            first = shards[0].cu_seqlens
            assert first is not None and first[-1] == micro * LENGTH
            assert all(torch.equal(first, shard.cu_seqlens) for shard in shards if shard.cu_seqlens is not None)
            assert first.tolist() == document_boundaries(rows["tokens"][-1].numpy(), END_OF_TEXT).tolist()
    return {name: torch.cat(values) for name, values in rows.items()}


@pytest.mark.parametrize(("dp_size", "cp_size", "micro"), [(1, 1, 1), (1, 1, 8), (2, 1, 2), (4, 2, 1), (1, 4, 4), (8, 3, 1), (2, 24, 2)])
def test_every_layout_reads_the_same_step(corpus: str, dp_size: int, cp_size: int, micro: int) -> None:
    order: SampleOrder = open_samples(run_config(corpus, sequence_length=LENGTH).data, "train")
    for step in (0, 5):
        whole = assemble(corpus, step, dp_size, cp_size, micro)
        expected = torch.from_numpy(np.stack([order.sample(step * 8 + i) for i in range(8)]))
        assert torch.equal(whole["tokens"], expected[:, :-1]) and torch.equal(whole["labels"], expected[:, 1:])
        assert torch.equal(whole["loss_mask"], (expected[:, :-1] != END_OF_TEXT).float())


def test_prefetching_reads_the_same(corpus: str) -> None:
    config = run_config(corpus, sequence_length=LENGTH, packing="concat", micro=2, batch=8)
    order = open_samples(config.data, "train")
    ahead, plain = BatchReader(order, config, 1, 2, prefetch=True), BatchReader(order, config, 1, 2, prefetch=False)
    for step in (0, 1, 2, 7, 8, 3, 3):  # in order, a jump ahead, back, the same again
        for got, expected in zip(ahead.micro_batches(step), plain.micro_batches(step), strict=True):
            assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.labels, expected.labels)
    ahead.close()
    assert torch.equal(ahead.micro_batches(9)[0].tokens, plain.micro_batches(9)[0].tokens)


def test_an_error_while_prefetching_is_raised(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(corpus, sequence_length=LENGTH)
    order = open_samples(config.data, "train")
    sample = order.sample

    def fail_at_one(index: int) -> np.ndarray:
        if index == 1:
            raise OSError("the disk went away")
        return sample(index)

    monkeypatch.setattr(order, "sample", fail_at_one)
    ahead = BatchReader(order, config, 0, 1)
    ahead.micro_batches(0)
    with pytest.raises(OSError, match="the disk went away"):
        ahead.micro_batches(1)
    ahead.close()


def test_a_token_beyond_the_vocabulary_is_a_message(corpus: str) -> None:
    """The manifest names the largest id, so only damage that keeps the file's size gets this far."""
    with Path(f"{corpus}.bin").open("r+b") as stream:
        stream.seek(40)
        stream.write(b"\xff\xff")
    with pytest.raises(OneRankError, match=r"hold token ids from \d+ to 65535, model.vocab_size is 60000: a token file is damaged"):
        reader(corpus).micro_batches(0)


def test_validation_reads_its_own_files(corpus: str, tmp_path: Path) -> None:
    write_token_file(tmp_path / "v", numbered_documents([60], first=5000))
    config = run_config(corpus, sequence_length=LENGTH, batch=2, validation=str(tmp_path / "v"))
    batches = BatchReader(open_samples(config.data, "validation"), config, 0, 1, prefetch=False).micro_batches(0)
    assert all(batch.tokens.min() >= 5000 for batch in batches)


def test_sizes_that_do_not_divide_are_refused(corpus: str) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size = 8 does not divide by .* 1 x 3"):
        reader(corpus, (0, 3))
    with pytest.raises(ConfigError, match=r"sequence_length = 24 does not divide by parallel\.context = 5"):
        reader(corpus, cp=(0, 5))


def test_moving_to_a_device_keeps_every_field_and_leaves_the_boundaries_where_the_exchange_is_planned() -> None:
    batch = make_batch(np.array([[5, 0, 6]]), END_OF_TEXT, isolate_documents=True).to("meta")
    assert batch.cu_seqlens is not None
    assert {tensor.device.type for tensor in (batch.tokens, batch.labels, batch.loss_mask)} == {"meta"}
    assert batch.cu_seqlens.device.type == "cpu"
    assert make_batch(np.array([[5, 0, 6]]), END_OF_TEXT, isolate_documents=False).to("cpu").cu_seqlens is None
