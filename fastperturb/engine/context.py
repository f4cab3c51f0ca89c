"""The context of a context transform: what scales the latents of a token, from those before it.

It is computed once a call, for all samples, from the exact embeddings of real tokens, or from the
last hidden states of one more pass of the exact prefix, without gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperturb.engine.architectures import understand
from fastperturb.engine.packed import PackedDocuments, needs_lengths
from fastperturb.engine.positions import document_starts, real_positions
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.sequences import Encoded, Sequences
from fastperturb.engine.trunk import TrunkInputs
from fastperturb.ops.context import scale_and_state
from fastperturb.transforms import Context, Transform


def latent_scale(
    transform: Transform,
    trunk: Any,
    embeddings: Tensor,  # [B, T, D], exact
    attention_mask: Tensor | None,  # [B, T]
    positions: Tensor | None,  # [B, T], which begin anew with a document; None: 0, 1, ...
    rows: Tensor | None = None,  # [B] or [B, T]
) -> Tensor | None:
    """Return the scale of each token's latents [B, T, R]; None for a transform without context."""
    if not isinstance(transform, Context):
        return None
    starts = None if positions is None else document_starts(positions, attention_mask)
    _check_documents(starts, attention_mask, rows)
    inputs = embeddings
    if transform.context_source == "trunk":
        inputs = exact_states(trunk, embeddings, attention_mask, positions)
    real = None if attention_mask is None else attention_mask.bool()
    return scale_and_state(transform, inputs, starts, real)[0]


def next_scale(
    lm: WrappedModel, embed: Any, sequences: Sequences, encoded: Encoded | None
) -> Tensor | None:
    """Return the scale of the tokens after those that are encoded, [N, L, R], in decoding.

    embed: the input embedding of the model that decodes.
    """
    transform, start = lm.transform, 0 if encoded is None else encoded.length
    if not isinstance(transform, Context):
        return None
    if transform.context_source == "trunk":  # a pass of all tokens at each step
        positions = real_positions(sequences.mask)
        trunk, embeddings = understand(lm.base).trunk, embed(sequences.ids)
        scale = latent_scale(transform, trunk, embeddings, sequences.mask, positions)
        return None if scale is None else scale[:, start:]
    real, state = sequences.mask[:, start:].bool(), None if encoded is None else encoded.context
    embeddings = embed(sequences.ids[:, start:])
    scale, state = scale_and_state(transform, embeddings, None, real, state)
    if encoded is not None:
        encoded.context = state
    return scale


@torch.no_grad()
def exact_states(
    trunk: Any, embeddings: Tensor, attention_mask: Tensor | None, positions: Tensor | None
) -> Tensor:
    """Return the trunk's last hidden states [B, T, D] of exact embeddings, without gradient."""
    documents = None
    if positions is not None and needs_lengths(trunk, attention_mask, positions):
        documents = PackedDocuments(positions)
    inputs = TrunkInputs(embeddings.detach()[None], attention_mask, positions)
    return inputs.hidden_states(trunk, None, documents)[0]


def _check_documents(
    starts: Tensor | None, attention_mask: Tensor | None, rows: Tensor | None
) -> None:
    """Raise where another row id goes on within a document, whose context it would see."""
    if rows is None or rows.ndim == 1:
        return
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # to look at them would wait
    changes = rows[:, 1:] != rows[:, :-1]
    if attention_mask is not None:
        changes &= (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    if starts is not None:
        changes &= ~starts[:, 1:]
    if changes.any():
        raise ValueError(
            "rows number several documents in a batch row whose position_ids do not begin anew "
            "with each: transform='context' would carry one document's context into the next; "
            "give position_ids that restart"
        )
