"""Section `model`: shape and conventions of the network."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from nha_megatron.layers.pattern import DEFAULT_KIND, Layer, read_pattern
from nha_megatron.layers.registry import kind_named, known_kinds

from .base import NonNegativeReal, PathString, Positive, PositiveReal, Section
from .errors import ConfigError, raise_problems
from .rope import inverse_frequencies, rope_problems

if TYPE_CHECKING:
    import torch

# The vocabulary is padded so that it splits over any power of two of tensor-parallel ranks, whatever layout a checkpoint was made with.
VOCABULARY_MULTIPLE = 128


class ModelConfig(Section):
    """A decoder-only transformer. `layers` says how each of its layers mixes tokens, by default with Native Hybrid Attention (NHA).

    In NHA each KV head keeps `num_slots` compressed rows and the last `window` tokens, and reads both with one softmax. Fields of another
    kind stand in a section of its name, `model.<kind>`.
    """

    # Sections of layer kinds are the only further keys: `_sections_of_kinds` refuses the others.
    model_config = ConfigDict(extra="allow")

    num_layers: Annotated[int, Field(ge=1, le=65536)]
    """Transformer blocks."""
    hidden_size: Positive
    """Width of the residual stream, channels."""
    ffn_hidden_size: Positive
    """Inner width of the SwiGLU MLP, channels."""
    num_heads: Positive
    """Query heads; a multiple of `num_kv_heads`."""
    num_kv_heads: Positive
    """Key/value heads. Tensor parallelism splits them."""
    head_dim: Positive = 0
    """Channels of one head, for keys and values. Null or absent: hidden_size // num_heads, filled in by validation."""
    layers: str = DEFAULT_KIND
    """Kind of every layer: a pattern such as "nha:64*7,full", repeated to the depth. `nha` takes its window from `window`, `nha:64` and
    `nha:full` name it; an item without a kind has the kind before it."""
    num_slots: Positive = 64
    """M: compressed key/value rows each KV head keeps."""
    window: int | str = 64
    """W of NHA layers: the last tokens seen exactly, the current one included. A number, "full" (global attention), 0 (slots alone), or a
    pattern over all layers such as "64*7,full", repeated to the depth."""
    tau: PositiveReal = 8.0
    """Divides the log-gate: g = logsigmoid(z) / tau. Larger is slower forgetting."""
    empty_slots: Literal["attend", "mask", "weight"] = "attend"
    """What slots do in the softmax while they hold little or nothing: take mass with logit 0 (the authors' convention), stay out until the
    first write, or be weighted by what has been written."""
    value_activation: Literal["silu", "none"] = "silu"
    """Applied to the values before the attention. Converted language models use none."""
    output_norm: Literal["rms", "none"] = "rms"
    """rms: RMSNorm(SiLU(output)) over all heads together. Converted language models use none."""
    qk_norm: Literal["none", "rms"] = "none"
    """rms: RMSNorm of each query and key head before both branches (Qwen3)."""
    qkv_bias: bool = False
    """Bias of the query, key and value projections (Qwen2)."""
    norm_eps: PositiveReal = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as the output matrix."""
    rope_theta: PositiveReal = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """As in Hugging Face configurations, `rope_type` one of default, linear, llama3, yarn with its keys."""
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the head's channels that rotate, the first ones."""
    vocab_size: Positive
    """Tokens of the tokenizer, before padding."""
    init_std: NonNegativeReal = 0.02
    """Standard deviation of the initial weights; output projections are scaled down by sqrt(2 num_layers)."""
    init_from: PathString | None = None
    """A Hugging Face directory or a checkpoint directory to take the weights from, and nothing but the weights."""

    @model_validator(mode="before")
    @classmethod
    def _absent_head_dim(cls, data: Any) -> Any:
        if isinstance(data, dict) and "head_dim" in data and data["head_dim"] is None:
            return {key: value for key, value in data.items() if key != "head_dim"}
        return data

    @model_validator(mode="wrap")
    @classmethod
    def _sections_of_kinds(cls, data: Any, handler: ModelWrapValidatorHandler[ModelConfig]) -> ModelConfig:
        """Validates `model.<kind>` by the kind's own section; a further key is unknown."""
        if not isinstance(data, dict):
            return handler(data)
        found: list[InitErrorDetails] = []
        values = {key: value for key, value in data.items() if key in cls.model_fields}
        for key in data.keys() - values.keys():
            section = cls.section_of_kind(key)
            if section is None:
                found.append(InitErrorDetails(type="extra_forbidden", loc=(key,), input=data[key]))
                continue
            try:
                values[key] = section.model_validate({} if data[key] is None else data[key])
            except ValidationError as error:
                found += _below(error, key)
        try:
            model = handler(values)
        except ValidationError as error:
            found = _below(error) + found
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return model

    @classmethod
    def section_of_kind(cls, name: str) -> type[Section] | None:
        """The section `model.<name>` of a layer kind that has one."""
        return kind_named(name).section if name in known_kinds() else None

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        problems = []
        if "head_dim" not in self.model_fields_set:
            if self.hidden_size % self.num_heads:
                problems.append(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; change one of them or give head_dim"
                )
            # The object is frozen for its users only: a default that depends on other fields is known here first.
            self.__dict__["head_dim"] = max(1, self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; change one of them")
        try:
            self._add_missing_sections()
            _ = self.stack
        except ConfigError as error:
            problems.append(str(error))
        if not problems:
            if self.rotary_dim < 2 or self.rotary_dim % 2:
                problems.append(
                    f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} is {self.rotary_dim} rotary channels; "
                    "it must be an even number of at least 2"
                )
            problems += rope_problems(self.rope_scaling, self.rope_theta, self.rotary_dim)
        raise_problems(problems)
        return self

    def _add_missing_sections(self) -> None:
        """Writes out the defaults of the kinds in the pattern; a section of another kind would change nothing, so it is refused."""
        used = {name for name, _ in read_pattern(self.layers, self.num_layers, known_kinds())}
        sections = self.__pydantic_extra__
        assert sections is not None
        for name in sorted(used):
            section = kind_named(name).section
            if section is not None and name not in sections:
                sections[name] = section()
        for name in sorted(sections.keys() - used):
            raise ConfigError(f"{name} is given, but no layer of layers {self.layers!r} is of this kind; remove it or name the kind there")

    @cached_property
    def stack(self) -> tuple[Layer, ...]:
        """Kind and options of every layer."""
        pattern = read_pattern(self.layers, self.num_layers, known_kinds())
        kinds = {name: kind_named(name) for name, _ in pattern}
        return tuple(Layer(kinds[name], kinds[name].options(self, argument, i)) for i, (name, argument) in enumerate(pattern))

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and output matrices: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def rope(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, float64 [rotary_dim / 2] in radians a token, and YaRN's factor on the rotated channels (else 1.0)."""
        import torch  # not at the head: a configuration is checked without loading torch

        frequencies, attention_factor = inverse_frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling)
        return torch.tensor(frequencies, dtype=torch.float64), attention_factor


def _below(error: ValidationError, *keys: str) -> list[InitErrorDetails]:
    """The problems of an inner validation, to be reported with those of an outer one."""
    details = error.errors(include_url=False)
    return [
        InitErrorDetails(type=detail["type"], loc=(*keys, *detail["loc"]), input=detail["input"], ctx=detail.get("ctx", {}))
        for detail in details
    ]
