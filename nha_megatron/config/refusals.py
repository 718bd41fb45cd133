"""What the configuration can say but the system cannot do yet: refused with the reason and the alternative.

Each refusal is one function; delete it together with its test when the feature arrives.
"""

from collections.abc import Mapping
from typing import Any

from .consistency import Check, run_checks
from .engines import no_new_model, no_pipeline


def problems(sections: Mapping[str, Any]) -> list[str]:
    """One message for each thing asked for that is not supported, among the valid sections."""
    checks: list[Check] = [no_pipeline, no_new_model]
    return run_checks(checks, sections)
