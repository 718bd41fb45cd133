"""Megatron's GPTModel with a head that computes the loss without holding the logits."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nha_megatron.estimate.logits import logit_chunk_tokens
from nha_megatron.model.chunked_loss import linear_cross_entropy


class LanguageModel(GPTModel):
    """A GPTModel that, given `labels` and `loss_mask`, returns the loss sum on its last stage, from hidden states chunk by chunk.

    Without labels it returns logits [b, s, V / tp], as a GPTModel does. Parameters and their names are those of a GPTModel.

    Args:
        real_vocab_size: tokens of the tokenizer; the columns of `vocab_size` beyond it are padding.
        z_loss: factor of the squared logarithm of the softmax's denominator, in the gradients alone (`linear_cross_entropy`).
    """

    def __init__(self, *, real_vocab_size: int, z_loss: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.z_loss = z_loss
        self.real_vocab_size = real_vocab_size

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Tensor | None = None, **options: Any) -> Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, loss_mask=loss_mask, **options)
        assert loss_mask is not None
        tp_group = self.pg_collection.tp
        tied = self.share_embeddings_and_output_weights
        return linear_cross_entropy(
            hidden_states,
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels,
            loss_mask,
            vocab_size=self.real_vocab_size,
            chunk_tokens=logit_chunk_tokens(self.vocab_size // tp_group.size()),
            tp_group=tp_group,
            sequence_parallel=self.output_layer.sequence_parallel,
            z_loss=self.z_loss,
        )
