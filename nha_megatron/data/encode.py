"""Text to token ids in worker processes. Imports no torch: a worker starts in a fraction of a second.

The order of the results is the order of the documents, whatever the number of workers.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
from tokenizers import Tokenizer

from nha_megatron.config import ConfigError

# One task: enough text that passing it costs little beside encoding it.
_TASK_CHARACTERS = 1_000_000
_TASK_DOCUMENTS = 1000

_tokenizer: Tokenizer | None = None  # of a worker process


def _start_worker(tokenizer_json: str) -> None:
    # Workers are the parallelism; each one's own thread pool would only fight with the others for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _tokenizer
    _tokenizer = _load(tokenizer_json)


def _load(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(tokenizer_json)
    # Text that spells a special token is text. Otherwise "<|endoftext|>" inside a document would cut it in two.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array(encoding.ids, dtype=np.int32) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _encode_in_worker(texts: Sequence[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return _encode(_tokenizer, texts)


def encode_documents(texts: Iterable[str], tokenizer_json: str, workers: int) -> Iterator[np.ndarray]:
    """int32 [length] for each text, in order, without special tokens. workers = 1 encodes in this process.

    Raises ConfigError if a worker dies, which is nearly always for lack of memory.
    """
    tasks = _tasks(texts)
    if workers == 1:
        tokenizer = _load(tokenizer_json)
        for task in tasks:
            yield from _encode(tokenizer, task)
        return
    # A bounded queue: the text comes from a stream that may be larger than memory.
    pending: deque[Future[list[np.ndarray]]] = deque()
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer_json,))
    try:
        for task in tasks:
            pending.append(executor.submit(_encode_in_worker, task))
            if len(pending) >= 3 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a worker process died while encoding, most likely for lack of memory. Use fewer than {workers} --workers, or split very "
            "long documents."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _tasks(texts: Iterable[str]) -> Iterator[list[str]]:
    task: list[str] = []
    characters = 0
    for text in texts:
        task.append(text)
        characters += len(text)
        if characters >= _TASK_CHARACTERS or len(task) >= _TASK_DOCUMENTS:
            yield task
            task, characters = [], 0
    if task:
        yield task
