"""Kernels start on the current device, which need not be that of the tensors: a model may be spread over several GPUs of one process."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of_first_argument(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):  # does nothing for tensors of the CPU
            return function(*args, **kwargs)

    return call
