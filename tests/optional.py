"""Tests of optional packages skip without them, with the reason; `NHA_TEST_REQUIRE=deepspeed` turns the skip into a failure."""

from __future__ import annotations

import importlib.util
import os

import pytest

_REQUIRED = "deepspeed" in os.environ.get("NHA_TEST_REQUIRE", "")

needs_deepspeed = pytest.mark.skipif(
    not _REQUIRED and importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"
)
