"""Fields that were renamed: the old name is still taken, with one line of notice.

A section names them as a user writes them: `renamed = {"guards.window": "guards.window_steps"}`.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

_noticed: set[str] = set()


def with_new_names(data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The plain data of a section, with its fields under the names of today. Raises ValueError when a field is given under both."""
    data = dict(data)
    for old, new in renamed.items():
        if last_part(old) in data:
            if last_part(new) in data:
                raise ValueError(f"{last_part(old)} is the old name of {last_part(new)}, and both are given; remove {last_part(old)}")
            notice(old, new)
            data[last_part(new)] = data.pop(last_part(old))
    return data


def notice(old: str, new: str) -> None:
    """Says once that a name is old, in one process of a job."""
    if old not in _noticed and os.environ.get("RANK", "0") == "0":
        print(f"note: {old} is now called {new}; the old name still works", file=sys.stderr)
    _noticed.add(old)


def last_part(name: str) -> str:
    """The key of a field inside its section."""
    return name.rpartition(".")[2]
