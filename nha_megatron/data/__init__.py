"""Data: corpus -> token files -> global sample order -> one batch per rank.

The names below are imported on first use, so that the worker processes of `prepare.py` start without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nha_megatron.data.batch import Batch
    from nha_megatron.data.order import SampleOrder, open_samples
    from nha_megatron.data.reader import BatchReader
    from nha_megatron.data.token_files import TokenFile, TokenFileWriter

__all__ = ["Batch", "BatchReader", "SampleOrder", "TokenFile", "TokenFileWriter", "open_samples"]

_MODULES = {
    "Batch": "batch",
    "BatchReader": "reader",
    "SampleOrder": "order",
    "TokenFile": "token_files",
    "TokenFileWriter": "token_files",
    "open_samples": "order",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
