"""From the global sample order to the micro batches of one rank."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from nha_megatron.config import ConfigError, OneRankError, RunConfig
from nha_megatron.data.batch import Batch, make_batch
from nha_megatron.data.order import SampleOrder
from nha_megatron.data.packing import PADDING


class BatchReader:
    """Reads the micro batches of one data-parallel and context-parallel rank.

    Row `row` of micro batch `micro` on data-parallel rank `dp_rank` in global step `step` is sample

        step * global_batch_size + (micro * dp_size + dp_rank) * micro_batch_size + row

    so a step holds the same samples for any number of ranks. Ranks that differ only in their tensor- or pipeline-parallel
    place read the same batch. With `prefetch` a thread reads step n + 1 while step n is used; what is read does not depend on it.

    Raises ConfigError if global_batch_size or sequence_length does not divide, and later OneRankError if a token does not fit the
    vocabulary.
    """

    def __init__(
        self,
        order: SampleOrder,
        config: RunConfig,
        dp_rank: int,
        dp_size: int,
        cp_rank: int = 0,
        cp_size: int = 1,
        *,
        prefetch: bool = True,
    ) -> None:
        self._order = order
        self._global_batch_size = config.training.global_batch_size
        self._micro_batch_size = config.training.micro_batch_size
        self._vocab_size = config.model.vocab_size
        self._isolate_documents = config.data.isolates_documents
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._cp_rank, self._cp_size = cp_rank, cp_size
        if self._global_batch_size % (self._micro_batch_size * dp_size):
            raise ConfigError(
                f"training.global_batch_size = {self._global_batch_size} does not divide by micro_batch_size x data-parallel size = "
                f"{self._micro_batch_size} x {dp_size}. Change one of them."
            )
        if order.sequence_length % cp_size:
            raise ConfigError(
                f"data.sequence_length = {order.sequence_length} does not divide by parallel.context = {cp_size}. Change one of them."
            )
        self.num_micro_batches = self._global_batch_size // (self._micro_batch_size * dp_size)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-reader") if prefetch else None
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    @property
    def padding_share(self) -> float:
        """The share of the places for tokens that packing leaves empty."""
        return self._order.padding_share

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of global step `step` >= 0, on the CPU. Steps may be asked in any order."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._read(step)
        if self._executor is not None:
            self._ahead = (step + 1, self._executor.submit(self._read, step + 1))
        return batches

    def close(self) -> None:
        """Stop the prefetch thread. The reader can still be used, without prefetch."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor, self._ahead = None, None

    def _read(self, step: int) -> list[Batch]:
        return [self._read_micro_batch(step, micro) for micro in range(self.num_micro_batches)]

    def _read_micro_batch(self, step: int, micro: int) -> Batch:
        first = step * self._global_batch_size + (micro * self._dp_size + self._dp_rank) * self._micro_batch_size
        samples = np.stack([self._order.sample(first + row) for row in range(self._micro_batch_size)])
        if samples.min() < PADDING or samples.max() >= self._vocab_size:
            # Opening the files read their manifests only. On a device this would be an assertion without a word about the data.
            raise OneRankError(
                f"samples {first} to {first + len(samples) - 1} hold token ids from {samples.min()} to {samples.max()}, model.vocab_size "
                f"is {self._vocab_size}: a token file is damaged. Copy it again or prepare the data again."
            )
        return make_batch(
            samples,
            self._order.end_of_text,
            isolate_documents=self._isolate_documents,
            cp_rank=self._cp_rank,
            cp_size=self._cp_size,
        )
