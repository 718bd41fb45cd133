"""Section `logging`: what a run writes about itself."""

from typing import Literal

from .base import PathString, Positive, Section


class LoggingConfig(Section):
    """What the run writes about itself."""

    directory: PathString
    """Folder of the run."""
    every: Positive = 1
    """Steps between lines on the console, in TensorBoard and in wandb; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb: Literal[True, False, "offline"] = False
    """Report to Weights & Biases. offline: into the run's folder, without a network; `wandb sync` reports it later."""
    layer_statistics: Positive | None = None
    """Steps between records of slot share, decay and write strength of every layer; null: never."""
