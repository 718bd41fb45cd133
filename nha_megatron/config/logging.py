"""Section `logging`: what a run writes about itself."""

from .base import PathString, Positive, Section


class LoggingConfig(Section):
    """What the run writes about itself."""

    directory: PathString
    """Folder of the run."""
    every: Positive = 1
    """Steps between lines on the console, in TensorBoard and in wandb; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb: bool = False
    """Report to Weights & Biases."""
    layer_statistics: Positive | None = None
    """Steps between records of slot share, decay and write strength of every layer; null: never."""
