"""The batches of a run with stages, on this rank.

    step     1 ... n     n+1 ... m                     of the run
    sample   0 ... n b   0 ... (m - n) b'              of the stage's own order, b samples a step

The position in the data follows from the step alone, so a run resumes inside any stage, on any number of ranks.
"""

from __future__ import annotations

from nha_megatron.config import ConfigError, RunConfig
from nha_megatron.config.stage_plan import Stage
from nha_megatron.data import Batch, BatchReader, SampleOrder, open_samples
from nha_megatron.data.order import require_bos
from nha_megatron.engine.layout import Layout


class StageData:
    """Training and validation batches, one stage at a time; a context manager.

    Opens the token files of all stages, so that a mistake in the last one is found before the first step. Validation reads from the start
    of data.validation in every stage, in batches of the stage's shape.

    Raises `ConfigError` when token files do not fit the configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._orders: dict[int, tuple[SampleOrder, SampleOrder | None]] = {}
        self._training: BatchReader | None = None
        self._validation: BatchReader | None = None
        self.stage: Stage | None = None
        end_of_text, tokenizer, first = None, None, None
        for stage in config.stages:
            data, vocabulary = stage.config.data, config.model.vocab_size
            training = open_samples(data, "train", end_of_text, vocabulary, stage.number)
            end_of_text = training.end_of_text
            made_by = training.corpora[0].tokens.manifest.tokenizer_sha256
            if tokenizer not in (None, made_by):
                raise ConfigError(
                    f"training.stages.{stage.number - 2}: token files {training.corpora[0].tokens.prefix!r} were made with another "
                    "tokenizer than those of the stages before. Prepare all corpora of a run with the same tokenizer."
                )
            tokenizer = made_by
            validation = None if config.training.validate_every is None else open_samples(data, "validation", end_of_text, vocabulary)
            self._orders[stage.number] = training, validation
            first = training.corpora[0].tokens if first is None else first
            for order in (training, validation):
                if order is not None:
                    require_bos(order.corpora[0].tokens, data, first)

    def begin(self, stage: Stage, layout: Layout) -> None:
        """Reads this stage from now on, as this rank of the layout; the stages before it are let go."""
        self.close()
        place = (layout.dp_rank, layout.dp_size, layout.cp_rank, layout.cp_size)
        self._orders = {number: orders for number, orders in self._orders.items() if number >= stage.number}
        training, validation = self._orders[stage.number]
        self.stage = stage
        self._training = BatchReader(training, stage.config, *place)
        if validation is not None:
            # Evaluations read a few batches from the start each time: reading ahead of the last one would be for nothing.
            self._validation = BatchReader(validation, stage.config, *place, prefetch=False)

    @property
    def padding_share(self) -> float:
        """The share of the places for tokens that packing leaves empty in a training sample of the stage."""
        assert self._training is not None
        return self._training.padding_share

    def epoch(self, step: int) -> float:
        """How often the stage has read, when step `step` of the run is done, the corpus of its blend that is used up fastest."""
        assert self.stage is not None
        order = self._orders[self.stage.number][0]
        samples = (step - self.stage.steps_before) * self.stage.config.training.global_batch_size
        return max(samples * share / corpus.samples_per_epoch for corpus, share in zip(order.corpora, order.blend.shares, strict=True))

    def training_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of step `step` of the run, one of the stage's, counted from 1."""
        assert self.stage is not None and self._training is not None and self.stage.steps_before < step <= self.stage.last_step
        return self._training.micro_batches(step - 1 - self.stage.steps_before)

    def validation_batches(self, index: int) -> list[Batch]:
        """This rank's micro batches of validation batch `index` >= 0."""
        assert self._validation is not None, "training.validate_every is null"
        return self._validation.micro_batches(index)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._training is not None:
            self._training.close()
        self._training = self._validation = self.stage = None

    def __enter__(self) -> StageData:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
