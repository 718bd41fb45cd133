"""JSON from files that anybody may have written."""

import json
from typing import Any


def read_json(text: str | bytes) -> Any:
    """Plain data. Raises ValueError for whatever cannot be read, brackets nested a thousand deep and numbers of thousands of digits too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
