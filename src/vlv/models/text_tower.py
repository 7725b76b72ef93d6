"""The frozen text tower T: caption embedding z in, context c out.

This is the one place where T is applied, for embeddings and for texts alike. Shapes: B batch, Q
queries, D text width, L token ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor

from vlv.models.compilation import own_precision

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

    Tower: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection


def num_positions(text_encoder: Tower) -> int:
    """The longest sequence that the text tower reads, in tokens."""
    return int(text_encoder.config.max_position_embeddings)


def contextualize(text_encoder: Tower, z: Tensor) -> Tensor:
    """Apply the text tower to embeddings: c = T(z).

    Paper, section 3.2: z stands where the token embeddings of a text would stand. T adds its
    position embeddings, runs its causal transformer and its final norm. ``CLIPTextModel.forward``
    takes token ids only, so its three parts are called here; on token embeddings the result equals
    that of ``forward`` on the ids.

    Args:
        text_encoder: The CLIP text transformer. Gradients pass through it to z.
        z: Caption embedding or token embeddings, (B, Q, D), Q at most `num_positions`.

    Returns:
        The context c, (B, Q, D).

    Raises:
        ValueError: z has another width or more tokens than the tower has positions.
    """
    _check_embeddings(text_encoder, z)
    tower = _transformer(text_encoder)
    with own_precision(text_encoder):
        hidden = tower.embeddings(inputs_embeds=z.to(text_encoder.dtype))  # positions added
        mask = _causal_mask(hidden)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        c: Tensor = tower.final_layer_norm(hidden)
        return c  # (B, Q, D)


def token_embeddings(text_encoder: Tower, ids: Tensor) -> Tensor:
    """Look up token embeddings, the space z lives in.

    Args:
        text_encoder: The CLIP text transformer.
        ids: Token ids, (B, L).

    Returns:
        Embeddings before positions are added, (B, L, D).
    """
    embeddings: Tensor = text_encoder.get_input_embeddings()(ids)
    return embeddings


def penultimate_and_last(text_encoder: Tower, z: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the text tower to embeddings, as `contextualize`, and keep two depths.

    SDXL and Stable Diffusion 3 read the states before the last layer, without the final norm, and
    take their pooled vector from the last ones.

    Args:
        text_encoder: The CLIP text transformer.
        z: Caption embedding or token embeddings, (B, Q, D).

    Returns:
        The states before the last layer, and the last ones after the final norm, each (B, Q, D).
    """
    _check_embeddings(text_encoder, z)
    tower = _transformer(text_encoder)
    with own_precision(text_encoder):
        hidden = tower.embeddings(inputs_embeds=z.to(text_encoder.dtype))
        mask = _causal_mask(hidden)
        *layers, last = tower.encoder.layers
        for layer in layers:
            hidden = layer(hidden, mask)
        return hidden, tower.final_layer_norm(last(hidden, mask))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text_encoder: Tower, texts: list[str]
) -> tuple[Tensor, Tensor]:
    """Turn texts into ids, padded and cut to the tower's length.

    Args:
        tokenizer: The CLIP tokenizer that belongs to the tower.
        text_encoder: The tower; its number of positions is the length.
        texts: B texts.

    Returns:
        ``(ids, truncated)``: token ids (B, L) and whether the text lost tokens, bool (B,).
    """
    length = num_positions(text_encoder)
    untruncated = tokenizer(texts, verbose=False).input_ids
    ids = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    truncated = torch.tensor([len(row) > length for row in untruncated])
    return ids.to(text_encoder.device), truncated


def _transformer(text_encoder: Tower) -> CLIPTextModel:
    """The transformer itself; a tower with projection holds it as a part."""
    return cast("CLIPTextModel", getattr(text_encoder, "text_model", text_encoder))


def _causal_mask(hidden: Tensor) -> Tensor:
    """Additive mask (1, 1, Q, Q), right under eager and sdpa: token k sees tokens <= k."""
    length = hidden.shape[1]
    floor = torch.finfo(hidden.dtype).min
    mask = torch.full((length, length), floor, dtype=hidden.dtype, device=hidden.device)
    return mask.triu(1)[None, None]


def _check_embeddings(text_encoder: Tower, z: Tensor) -> None:
    width, length = int(text_encoder.config.hidden_size), num_positions(text_encoder)
    if z.ndim != 3 or z.shape[-1] != width:
        raise ValueError(
            f"the text tower reads embeddings of shape (B, Q, {width}), got {tuple(z.shape)}"
        )
    if z.shape[1] > length:
        raise ValueError(f"the text tower has {length} positions, got {z.shape[1]} embeddings")
