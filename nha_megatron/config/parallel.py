"""Section `parallel`: how one model is split over ranks."""

from typing import Literal

from .base import Positive, Section
from .errors import ConfigError


class ParallelConfig(Section):
    """Sizes of the parallel groups. What the product leaves of the world is data parallel.

    Rank order, fastest first: tensor, context, data, pipeline.
    """

    tensor: Positive = 1
    """Ranks that share every matrix; splits KV heads, MLP channels and the vocabulary."""
    pipeline: Positive = 1
    """Ranks that hold consecutive layers."""
    virtual_pipeline: Positive | None = None
    """Model chunks per pipeline rank (interleaved schedule); null: one chunk, 1F1B."""
    context: Positive = 1
    """Ranks that hold consecutive, contiguous shards of every sequence."""
    sequence: bool = False
    """Split the activations between the tensor-parallel regions along the sequence (needs tensor > 1)."""
    cp_comm_type: Literal["auto", "a2a", "all_gather"] = "auto"
    """How `full` layers are computed over context ranks: each rank whole sequences of some heads (a2a; query heads must divide by
    tensor x context), or some queries against all keys and values (all_gather). auto: a2a where heads divide."""

    @property
    def model_ranks(self) -> int:
        """Ranks that one replica of the model takes."""
        return self.tensor * self.pipeline * self.context

    def data(self, world_size: int) -> int:
        """Data-parallel size in a world of that many ranks. Raises `ConfigError` when the replica does not fit."""
        if world_size < 1 or world_size % self.model_ranks:
            raise ConfigError(
                f"world size {world_size}: must be a multiple of tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} "
                f"= {self.model_ranks}; start that many ranks (or 2, 3, .. times as many), or change parallel.tensor, pipeline or context"
            )
        return world_size // self.model_ranks
