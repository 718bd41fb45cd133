"""Inverse frequencies of rotary position embeddings, with the scalings of pretrained checkpoints.

Plain float64 arithmetic: no torch, so that a configuration can be checked without loading it. The conventions and key names are
those of Hugging Face transformers (`modeling_rope_utils.ROPE_INIT_FUNCTIONS`), which pretrained checkpoints are written for.
"""

import math
from collections.abc import Mapping
from typing import Any

_YARN_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# rope_type -> (required keys, optional keys)
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor", "original_max_position_embeddings"), _YARN_OPTIONAL),
}
_REFUSED = {
    "dynamic": "its frequencies change with the length of the sequence, so training and decoding would disagree",
    "longrope": "its frequencies depend on the length of the sequence, so training and decoding would disagree",
}


def rope_type(scaling: Mapping[str, Any] | None) -> str:
    """Name of the scaling; `type` is the older spelling of `rope_type`."""
    if scaling is None:
        return "default"
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def rope_problems(scaling: Mapping[str, Any] | None, theta: float, rotary_dim: int) -> list[str]:
    """Everything wrong with a `rope_scaling` entry, one message each; empty when it can be used."""
    if scaling is None:
        return []
    kind = rope_type(scaling)
    if kind in _REFUSED:
        return [f"rope_scaling type {kind!r} is not supported: {_REFUSED[kind]}; use one of {', '.join(_KEYS)}"]
    if kind not in _KEYS:
        return [f"rope_scaling type {kind!r} is unknown; allowed: {', '.join(_KEYS)}"]
    required, optional = _KEYS[kind]
    problems = [f"rope_scaling of type {kind!r} needs {key!r}" for key in required if key not in scaling]
    allowed = {"rope_type", "type", *required, *optional}
    problems += [
        f"rope_scaling of type {kind!r} has no key {key!r}; allowed: {', '.join(sorted(allowed - {'rope_type', 'type'})) or 'none'}"
        for key in scaling
        if key not in allowed
    ]
    for key, value in scaling.items():
        if key in ("rope_type", "type", "truncate") or key not in allowed or (value is None and key in optional):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            problems.append(f"rope_scaling {key!r}: given {value!r}, must be a finite number greater than 0")
    if "truncate" in scaling and "truncate" in allowed and not isinstance(scaling["truncate"], bool):
        problems.append(f"rope_scaling 'truncate': given {scaling['truncate']!r}, must be true or false")
    if not problems and "factor" in required and scaling["factor"] < 1:
        problems.append(f"rope_scaling 'factor': given {scaling['factor']!r}, must be at least 1 (it lengthens the context)")
    if not problems and kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        problems.append("rope_scaling of type 'llama3' needs high_freq_factor greater than low_freq_factor")
    if not problems and kind == "yarn" and (theta <= 1 or rotary_dim < 4):
        problems.append("rope_scaling of type 'yarn' needs rope_theta greater than 1 and at least 4 rotary channels")
    return problems


def inverse_frequencies(rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> tuple[list[float], float]:
    """Inverse frequencies, [rotary_dim / 2] in radians a token, and the factor on the rotated channels (1.0 unless YaRN).

    `scaling` must have passed `rope_problems`.
    """
    assert rotary_dim % 2 == 0
    plain = [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    kind = rope_type(scaling)
    if scaling is None or kind == "default":
        return plain, 1.0
    if kind == "linear":
        return [f / scaling["factor"] for f in plain], 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    assert kind == "yarn", kind
    return _yarn(plain, rotary_dim, theta, scaling), _yarn_attention_factor(scaling)


def _llama3(plain: list[float], scaling: Mapping[str, Any]) -> list[float]:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a linear blend in rotations between."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for frequency in plain:
        rotations = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = min(1.0, max(0.0, (rotations - low) / (high - low)))
        scaled.append((1 - keep) * frequency / factor + keep * frequency)
    return scaled


def _yarn(plain: list[float], rotary_dim: int, theta: float, scaling: Mapping[str, Any]) -> list[float]:
    """YaRN (arXiv 2309.00071), section 3.2: a ramp over channels from extrapolation to interpolation."""

    def channel(rotations: float) -> float:
        return rotary_dim * math.log(scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    scaled = []
    for i, frequency in enumerate(plain):
        interpolate = min(1.0, max(0.0, (i - low) / width))
        scaled.append(interpolate * frequency / scaling["factor"] + (1 - interpolate) * frequency)
    return scaled


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """YaRN's temperature, section 3.3: 0.1 ln(factor) + 1, or the ratio of two of them (DeepSeek's mscale)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
