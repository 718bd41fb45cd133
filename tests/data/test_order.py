"""The global sample order: what an epoch holds, and that it is a pure function of seed and index."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nha_megatron.config import ConfigError
from nha_megatron.data.order import SampleOrder, open_samples
from tests.data.token_file_cases import END_OF_TEXT, numbered_documents, run_config, write_token_file


def open_order(path: object, sequence_length: int, split: str = "train", **data: object) -> SampleOrder:
    return open_samples(run_config(path, sequence_length=sequence_length, **data).data, split, END_OF_TEXT)  # type: ignore[arg-type]


def blend_of(*entries: tuple[Path, float]) -> list[dict[str, object]]:
    return [{"path": str(path), "weight": weight} for path, weight in entries]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """40 documents, every token but end-of-text unique: lengths 1 to 40, one of them empty."""
    write_token_file(tmp_path / "c", numbered_documents([*range(1, 40), 0]))
    return str(tmp_path / "c")


@pytest.mark.parametrize("sequence_length", [1, 7, 64])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_shows_every_token_once(corpus: str, sequence_length: int, epoch: int) -> None:
    order = open_order(corpus, sequence_length)
    per_epoch = order.corpora[0].samples_per_epoch
    total = order.corpora[0].tokens.num_tokens
    assert per_epoch == (total - 1) // sequence_length
    samples = [order.sample(epoch * per_epoch + i) for i in range(per_epoch)]
    assert all(sample.shape == (sequence_length + 1,) and sample.dtype == np.int64 for sample in samples)
    inputs = Counter(token for sample in samples for token in sample[:-1].tolist())
    labels = Counter(token for sample in samples for token in sample[1:].tolist())
    for counts in (inputs, labels):
        assert counts.total() == per_epoch * sequence_length  # the rest, less than one sample, waits for another epoch
        assert all(count == 1 for token, count in counts.items() if token != END_OF_TEXT)


def test_samples_are_cut_from_whole_documents_in_sequence(corpus: str) -> None:
    """Inside a sample tokens count up until an end-of-text; after it another document begins at its first token."""
    order = open_order(corpus, 50)
    firsts = {document[0] for document in numbered_documents(list(range(1, 40)))}
    for index in range(60):
        sample = order.sample(index).tolist()
        for now, following in pairwise(sample):
            if now == END_OF_TEXT:
                assert following in firsts or following == END_OF_TEXT  # the empty document
            else:
                assert following in (now + 1, END_OF_TEXT)


def test_neighbours_in_the_stream_share_one_token(tmp_path: Path) -> None:
    """One document of 1 + 4 N tokens with its end: the N samples, put back in order, are the document."""
    write_token_file(tmp_path / "c", [list(range(1, 41))])
    order = open_order(str(tmp_path / "c"), 4)
    samples = sorted((order.sample(i).tolist() for i in range(10)), key=lambda sample: sample[0])
    assert samples[0][0] == 1 and samples[-1][-1] == END_OF_TEXT
    assert all(left[-1] == right[0] for left, right in pairwise(samples))
    assert [sample[0] for sample in (order.sample(i) for i in range(10))] != sorted(sample[0] for sample in samples)


def test_pure_function_of_seed_and_index(corpus: str) -> None:
    first, again = open_order(corpus, 16, seed=5), open_order(corpus, 16, seed=5)
    indexes = [977, 3, 10**9, 0, 51, 52, 2**40]  # epochs out of order, and far ones
    expected = {index: first.sample(index).tolist() for index in indexes}
    assert all(again.sample(index).tolist() == expected[index] for index in reversed(indexes))


def test_seeds_epochs_and_splits_differ(corpus: str) -> None:
    order = open_order(corpus, 16)
    per_epoch = order.corpora[0].samples_per_epoch

    def epoch(order: SampleOrder, number: int) -> list[list[int]]:
        return [order.sample(number * per_epoch + i).tolist() for i in range(per_epoch)]

    versions = [
        epoch(order, 0),
        epoch(order, 1),
        epoch(open_order(corpus, 16, seed=1), 0),
        epoch(open_order(corpus, 16, "validation", validation=corpus), 0),
    ]
    for i, version in enumerate(versions):
        for other in versions[:i]:
            assert sum(sample in other for sample in version) < per_epoch // 4  # other documents beside each other: other cuts


def test_order_never_changes(corpus: str) -> None:
    """Numbers written down once: a run must resume with the same data after any update."""
    order = open_order(corpus, 4, seed=7)
    assert [order.sample(i).tolist() for i in (0, 1, 1000)] == EXPECTED_SAMPLES


def test_documents_of_only_end_of_text(tmp_path: Path) -> None:
    write_token_file(tmp_path / "c", [[], [], [], [5], []])
    order = open_order(str(tmp_path / "c"), 5)
    assert sorted(order.sample(0).tolist()) == [0, 0, 0, 0, 0, 5]


def test_blend_follows_the_weights(tmp_path: Path) -> None:
    """Three corpora of different sizes and types; the small one runs through many epochs."""
    ranges = [(1, 1000), (1001, 1101), (30000, 45000)]
    for i, (low, high) in enumerate(ranges):
        write_token_file(tmp_path / str(i), numbered_documents([10] * ((high - low) // 10), first=low), vocab_size=[60000, 2000, 100000][i])
    order = open_order(blend_of((tmp_path / "0", 0.5), (tmp_path / "1", 2.0), (tmp_path / "2", 7.5)), 16)
    counts = [0, 0, 0]
    for index in range(1000):
        sample = order.sample(index)
        tokens = sample[sample != END_OF_TEXT]
        (corpus,) = [i for i, (low, high) in enumerate(ranges) if low <= tokens[0] < high]
        assert all(ranges[corpus][0] <= token < ranges[corpus][1] for token in tokens.tolist())
        counts[corpus] += 1
    assert counts == pytest.approx([50, 200, 750], abs=2)  # depth of the tree: 2


def test_corpora_of_a_blend_are_shuffled_independently(tmp_path: Path) -> None:
    for name in "ab":
        write_token_file(tmp_path / name, numbered_documents([7] * 30))
    order = open_order(blend_of((tmp_path / "a", 1.0), (tmp_path / "b", 1.0)), 8)
    first, second = ([corpus.sample(i).tolist() for i in range(20)] for corpus in order.corpora)
    assert first != second


@pytest.mark.parametrize(("tokens", "fits"), [(8, False), (9, True)])
def test_corpus_shorter_than_one_sample_is_refused(tmp_path: Path, tokens: int, fits: bool) -> None:
    write_token_file(tmp_path / "c", [list(range(1, tokens))])
    if fits:
        assert open_order(str(tmp_path / "c"), 8).sample(12).tolist() == [*range(1, 9), END_OF_TEXT]
    else:
        with pytest.raises(ConfigError, match=r"hold 8 tokens; one sample of data.sequence_length = 8 needs 9"):
            open_order(str(tmp_path / "c"), 8)


def test_empty_token_files_are_refused(tmp_path: Path) -> None:
    write_token_file(tmp_path / "c", [])
    with pytest.raises(ConfigError, match="hold no documents"):
        open_order(str(tmp_path / "c"), 8)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, corpus: str) -> None:
    data = run_config(corpus, sequence_length=8).data
    with pytest.raises(ConfigError, match="end documents with token 0, expected is 3"):
        open_samples(data, "train", 3)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 100"):
        open_samples(data, "train", vocab_size=100)
    with pytest.raises(ConfigError, match=r"data\.validation names no token files"):
        open_samples(data, "validation")
    write_token_file(tmp_path / "other", [list(range(1, 50))], tokenizer_sha256="b" * 64)
    with pytest.raises(ConfigError, match="were made with different tokenizers"):
        open_order(blend_of((tmp_path / "c", 1.0), (tmp_path / "other", 1.0)), 8)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ConfigError, match=r"there is no file .*tokenizer\.json"):
        open_order(corpus, 8, tokenizer=str(tmp_path / "tokenizer"))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"another tokenizer .* than data\.tokenizer"):
        open_order(corpus, 8, tokenizer=str(tmp_path / "tokenizer"))


EXPECTED_SAMPLES = [[185, 186, 187, 188, 189], [278, 279, 280, 281, 282], [388, 389, 390, 391, 392]]
