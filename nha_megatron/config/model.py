"""Section `model`: shape and conventions of the network."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from nha_megatron.estimate import arithmetic

from .base import NonNegativeReal, PathString, Positive, PositiveReal, Section
from .errors import ConfigError, raise_problems
from .rope import inverse_frequencies, rope_problems
from .windows import parse_windows

if TYPE_CHECKING:
    import torch

# The vocabulary is padded so that it splits over any power of two of tensor-parallel ranks, whatever layout a checkpoint was made with.
VOCABULARY_MULTIPLE = 128


class ModelConfig(Section):
    """A decoder-only transformer whose attention layers are Native Hybrid Attention.

    Each KV head keeps `num_slots` compressed rows and the last `window` tokens, and reads both with one softmax.
    """

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
    num_slots: Positive = 64
    """M: compressed key/value rows each KV head keeps."""
    window: int | str = 64
    """W: the last tokens seen exactly, the current one included. A number, "full" (global attention), 0 (slots alone), or a pattern over
    the layers such as "64*7,full", repeated to the depth."""
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

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
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
            parse_windows(self.window, self.num_layers)
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

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Window of every layer in tokens; None is global attention."""
        return parse_windows(self.window, self.num_layers)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and output matrices: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def rope(self) -> "tuple[torch.Tensor, float]":
        """Inverse frequencies, float64 [rotary_dim / 2] in radians a token, and YaRN's factor on the rotated channels (else 1.0)."""
        import torch  # not at the head: a configuration is checked without loading torch

        frequencies, attention_factor = inverse_frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling)
        return torch.tensor(frequencies, dtype=torch.float64), attention_factor

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters of the whole model; without the embedding and output matrices when `embeddings` is False."""
        return arithmetic.num_parameters(self, embeddings)

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs of forward and backward for one token of a sequence of that length; recomputation is not counted."""
        return arithmetic.flops_per_token(self, sequence_length)

    def state_bytes(self, length: int | None = None, element_bytes: int = 2) -> int:
        """Bytes of the memory of all layers for one sequence of `length` tokens (needed only when a layer is `full`)."""
        return arithmetic.state_bytes(self, length, element_bytes)
