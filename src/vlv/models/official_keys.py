"""The names in the authors' checkpoints, and what each is called here.

Stage 1 (their ``SDModel``) holds ``query_embed``, ``language_proj``, ``model`` (Florence-2 in its
remote code's names), ``text_encoder``, ``unet`` and ``vae``; stage 2 (``CLIPDecoder``) holds
``qwen2_model``, ``mlp`` and, under ``VLV_model``, stage 1 again.
"""

from __future__ import annotations

import re

FLORENCE_HEADS = (
    "vision_tower",
    "image_projection",
    "image_proj_norm",
    "image_pos_embed",
    "visual_temporal_embed",
    "language_model",
)
_OTHER_HEADS = ("query_embed", "language_proj", "text_encoder", "unet", "vae")
_STAGE2_HEADS = ("qwen2_model", "mlp")
_STAGE1_IN_STAGE2 = "VLV_model."
_WRAPPING = re.compile(r"(?:(?:module|model|_orig_mod)\.)+")
_UNNEEDED = re.compile(
    r"model\.language_model\.(lm_head\.weight|final_logits_bias)"
    r"|(text_encoder|qwen2_model)\..*(position_ids|rotary_emb\.inv_freq)"
)

_VISION = "model.vision_tower."
_PROJECTOR = "model.multi_modal_projector."
_FLORENCE_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(convs\.\d+)\.conv\.", r"\1.proj."),
        (r"\.conv([12])\.", r".conv\1.fn.dw."),
        (r"\.(window|channel)_attn\.", r".\1_attn.fn."),
        (r"\.spatial_block\.norm1\.", r".spatial_block.window_attn.norm."),
        (r"\.channel_block\.norm1\.", r".channel_block.channel_attn.norm."),
        (r"\.norm2\.", r".ffn.norm."),
        (r"\.ffn\.fc", r".ffn.fn.net.fc"),
    )
]


def canonical(key: str) -> str | None:
    """A key without wrappers such as ``module.`` and without ``VLV_model.``.

    Their own ``model.`` before Florence-2's names is kept, or put back where a wrapper's was taken
    for it.

    >>> canonical("module.model.model.vision_tower.convs.0.proj.weight")
    'model.vision_tower.convs.0.proj.weight'
    >>> canonical("VLV_model.module.query_embed")
    'query_embed'

    Returns:
        The key; None where it is none of theirs.
    """
    bare = _bare(key)
    if bare.startswith(_STAGE1_IN_STAGE2):
        bare = _bare(bare.removeprefix(_STAGE1_IN_STAGE2))
    elif _head(bare) in _STAGE2_HEADS:
        return bare
    if _head(bare) in FLORENCE_HEADS:
        return f"model.{bare}"
    return bare if _head(bare) in _OTHER_HEADS else None


def is_stage2(key: str) -> bool:
    """Whether only a checkpoint of stage 2 has such a key."""
    bare = _bare(key)
    return bare.startswith(_STAGE1_IN_STAGE2) or _head(bare) in _STAGE2_HEADS


def is_unneeded(key: str) -> bool:
    """Whether a canonical key belongs to them but is not used here.

    Their lm_head is a frozen copy of the token embedding from before the training; the native class
    ties it to the embedding, and loading it would overwrite what was trained.
    """
    return _UNNEEDED.fullmatch(key) is not None


def florence_names(native: str) -> tuple[str, ...]:
    """Names in the authors' checkpoint of a tensor of ``Florence2ForConditionalGeneration``.

    Several names are copies of one tensor, the preferred first. The image projection is stored
    transposed.
    """
    if native.startswith(_VISION):
        name = native.removeprefix(_VISION)
        for pattern, replacement in _FLORENCE_RENAMES:
            name = pattern.sub(replacement, name)
        return (f"model.vision_tower.{name}",)
    if native == f"{_PROJECTOR}image_projection.weight":
        return ("model.image_projection",)
    if native.startswith(_PROJECTOR):
        name = native.removeprefix(_PROJECTOR)
        return (f"model.{name.replace('image_position_embed', 'image_pos_embed')}",)
    name = native.removeprefix("model.language_model.")
    prefix = "model.language_model.model."
    if name == "shared.weight":
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        return (f"{prefix}{name}", *(f"{prefix}{copy}" for copy in copies))
    return (f"{prefix}{name}",)


def text_tower_names(native: str) -> tuple[str, ...]:
    """Names of a tensor of ``CLIPTextModel``, with the level of older versions and without."""
    return (f"text_encoder.text_model.{native}", f"text_encoder.{native}")


def _bare(key: str) -> str:
    return _WRAPPING.sub("", key, count=1) if _WRAPPING.match(key) else key


def _head(key: str) -> str:
    return key.split(".", 1)[0]
