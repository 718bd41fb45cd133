"""The modelling file of an exported model: modeling_nha.py with all that it needs inlined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nha_megatron.config import rope
from nha_megatron.hf.families.nha import token_placement
from nha_megatron.hf.inline import inline
from nha_megatron.layers import modeling
from nha_megatron.layers.hugging_face import HuggingFaceLayer, form_of
from nha_megatron.layers.kind import LayerKind

KERNELS = "nha_kernels"


def modeling_source(kinds: Sequence[LayerKind]) -> str:
    """Text of the file for a stack of these layer kinds: in the order of dependence the operators, what layers share, the kinds' own."""
    forms = {kind.name: form_of(kind) for kind in kinds}
    of_kinds = dict(source for form in forms.values() for source in form.sources())
    roots: dict[str, Path | str] = {name: file for name, file in of_kinds.items() if name == KERNELS}
    for module in (rope, modeling):
        roots[module.__name__] = Path(str(module.__file__))
    roots |= {name: file for name, file in of_kinds.items() if name != KERNELS}
    roots[token_placement.__name__] = Path(str(token_placement.__file__))
    roots["nha_megatron.hf.families.nha.attention_classes"] = _attention_classes(forms)
    return inline(Path(__file__).with_name("modeling_nha.py").read_text(), roots, optional=KERNELS)


def _attention_classes(forms: dict[str, HuggingFaceLayer]) -> str:
    """The table that takes the place of attention_classes.py."""
    classes = {name: form.attention_class().__name__ for name, form in forms.items()}
    imports = "\n".join(f"from {form.sources()[-1][0]} import {classes[name]}" for name, form in forms.items())
    table = ", ".join(f"{name!r}: {attention}" for name, attention in classes.items())
    return f"{imports}\n\n\ndef attention_class(kind):\n    return {{{table}}}[kind]\n"
