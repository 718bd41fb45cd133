"""Blocks of input to token ids in worker processes, which read the rows and encode the texts. Imports no torch: a worker starts in a
fraction of a second.

The order of the results is the order of the blocks, whatever the number of workers. A worker ends when the main process does, however that
ends.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
from tokenizers import Tokenizer

from nha_megatron.config import ConfigError
from nha_megatron.data.rows import Block, Counts, Texts

# One task: enough text that passing it costs little beside encoding it.
_TASK_CHARACTERS = 1_000_000
_TASK_DOCUMENTS = 1000

# A block takes a tenth of a second. A tokenizer's regular expression can take for ever over some text: then nothing would ever say so.
_SECONDS_A_BLOCK = 300.0
_CHARACTERS_A_SECOND = 20_000

_tokenizer: Tokenizer | None = None  # of a worker process


# Ids put before every document (None: nothing) and after it, end-of-text.
Around = tuple[int | None, int]


@dataclass(frozen=True)
class Encoded:
    """Documents of one block, one after the other, each ended by end-of-text."""

    tokens: np.ndarray  # int32
    lengths: np.ndarray  # int64, of each document, what is put around it included
    counts: Counts


def _start_worker(tokenizer_json: str) -> None:
    # Workers are the parallelism; each one's own thread pool would only fight with the others for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A terminal's Ctrl-C reaches all processes; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _tokenizer
    _tokenizer = _load(tokenizer_json)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _load(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(tokenizer_json)
    # Text that spells a special token is text. Otherwise "<|endoftext|>" inside a document would cut it in two.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, block: Block, around: Around) -> Encoded:
    documents = block.documents()
    texts = [text for text in documents.texts if not (text.isspace() or not text)]
    documents.counts.empty += len(documents.texts) - len(texts)
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and a Rust panic is a BaseException that cannot be pickled
        raise ConfigError(
            f"{block.where} and what follows: the tokenizer cannot encode it ({str(error)[:200]}). Its regular expression may backtrack "
            "without end over this text: use another tokenizer, or leave the text out."
        ) from None
    begin, end = around
    first = 0 if begin is None else 1
    lengths = np.array([first + len(encoding) + 1 for encoding in encodings], dtype=np.int64)
    tokens = np.empty(int(lengths.sum()), dtype=np.int32)
    start = 0
    for encoding, length in zip(encodings, lengths.tolist(), strict=True):
        if begin is not None:
            tokens[start] = begin
        tokens[start + first : start + length - 1] = encoding.ids
        tokens[start + length - 1] = end
        start += length
    return Encoded(tokens, lengths, documents.counts)


def _encode_in_worker(block: Block, around: Around) -> Encoded:
    assert _tokenizer is not None
    return _encode(_tokenizer, block, around)


def encode_blocks(blocks: Iterable[Block], tokenizer_json: str, around: Around, workers: int) -> Iterator[Encoded]:
    """The documents of each block, in order. workers = 1 encodes in this process.

    Raises ConfigError for what the input holds, if a worker dies, which is nearly always for lack of memory, and if a block takes many
    times longer than any text should.
    """
    if workers == 1:
        tokenizer = _load(tokenizer_json)
        for block in blocks:
            yield _in_time(lambda block=block: _encode(tokenizer, block, around), block)  # type: ignore[misc]
        return
    # A bounded queue: the text comes from a stream that may be larger than memory.
    pending: deque[tuple[Block, Future[Encoded]]] = deque()
    others = multiprocessing.active_children()
    executor = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer_json,)
    )

    def first() -> Encoded:
        block, future = pending.popleft()
        try:
            return future.result(timeout=_limit(block))
        except TimeoutError:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()
            raise _too_slow(block) from None

    try:
        for block in blocks:
            pending.append((block, executor.submit(_encode_in_worker, block, around)))
            if len(pending) >= 3 * workers:
                yield first()
        while pending:
            yield first()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a worker process died while encoding, most likely for lack of memory. Use fewer than {workers} --workers, or split very "
            "long documents."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _limit(block: Block) -> float:
    return _SECONDS_A_BLOCK + block.size / _CHARACTERS_A_SECOND


def _too_slow(block: Block) -> ConfigError:
    return ConfigError(
        f"{block.where} and what follows: encoding {block.size:,} bytes took longer than {_limit(block):,.0f} seconds. The tokenizer's "
        "regular expression most likely backtracks without end over this text: use another tokenizer, or leave the text out."
    )


def _in_time(work: Callable[[], Encoded], block: Block) -> Encoded:
    """In a thread of its own, because one that is stuck in the tokenizer cannot be interrupted. It ends with the process."""
    result: Future[Encoded] = Future()

    def target() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    try:
        return result.result(timeout=_limit(block))
    except TimeoutError:
        raise _too_slow(block) from None


def encode_documents(texts: Iterable[str], tokenizer_json: str, workers: int) -> Iterator[np.ndarray]:
    """int32 [length] for each text with any character but white space, in order, without special tokens. Else as `encode_blocks`."""
    for encoded in encode_blocks(blocks_of(texts, "texts"), tokenizer_json, (None, 0), workers):
        for document in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]) if encoded.lengths.size else []:
            yield document[:-1]


def blocks_of(texts: Iterable[str], where: str) -> Iterator[Texts]:
    """Texts in blocks of the size of a task."""
    block: list[str] = []
    characters = count = 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if characters >= _TASK_CHARACTERS or len(block) >= _TASK_DOCUMENTS:
            yield _block(where, count, block)
            count += len(block)
            block, characters = [], 0
    if block:
        yield _block(where, count, block)


def _block(where: str, before: int, texts: Sequence[str]) -> Texts:
    return Texts(f"{where}, document {before + 1}", list(texts))
