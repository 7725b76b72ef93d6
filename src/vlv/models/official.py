"""The authors' checkpoints as VLV pipelines.

Trained tensors must come from the checkpoint; frozen ones (vision tower, text tower, U-Net, VAE) are
taken from the component folders where it leaves them out. Shapes: Q queries, d Florence width, D text
width, E language-model width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    CLIPTextModel,
    Florence2ForConditionalGeneration,
)

from vlv.errors import CheckpointError
from vlv.models.captioner import CaptionDecoder
from vlv.models.card import Origin, Provenance, model_card, origin_of
from vlv.models.components import check_replaceable
from vlv.models.encoder import VLVEncoder
from vlv.models.folder import Reference, quiet_loading
from vlv.models.official_files import PICKLE_LIMIT, read_tensors
from vlv.models.official_parts import Components as Components
from vlv.models.official_parts import (
    canonical,
    florence_names,
    is_stage2,
    is_unneeded,
    text_tower_names,
)
from vlv.models.pipeline import VLVPipeline

logger = logging.getLogger(__name__)

ESSENTIAL = {
    1: {
        "query_embed": "the queries",
        "language_proj.": "the projector",
        "model.language_model.": "Florence-2's language model",
    },
    2: {"mlp.": "the caption decoder's projector", "qwen2_model.": "the language model"},
}
"""What a checkpoint of each stage must hold; stage 2 holds stage 1 too."""


@dataclass
class Report:
    """What became of the tensors of a checkpoint; names are those in the file.

    Attributes:
        stage: 1 or 2.
        used: Taken over.
        unneeded: Known and left out: copies of other tensors, tables that are computed.
        missing: Not in the checkpoint, though others of the same part are; read from the component
            folders.
        unexpected: Unknown, or contradicting the tensor they should be a copy of.
        misshaped: Frozen tensors of another shape than the components say, with both shapes; read
            from the component folders.
        sources: For each part of the model "checkpoint", "components", "checkpoint and components"
            or "absent".
    """

    stage: int
    used: list[str] = field(default_factory=list)
    unneeded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def lines(self, most: int = 8) -> list[str]:
        """The report in words, at most `most` names of each kind."""
        parts = ", ".join(f"{part} from {source}" for part, source in self.sources.items())
        lines = [f"stage {self.stage}: {parts.replace('from absent', 'absent')}"]
        for kind in ("used", "unneeded", "missing", "unexpected", "misshaped"):
            names = getattr(self, kind)
            lines.append(f"{kind}: {len(names)}")
            if kind != "used":
                lines += [f"  {name}" for name in names[:most]]
                lines += [f"  and {len(names) - most} more"] * (len(names) > most)
        return lines


class LoadOptions(TypedDict, total=False):
    """How a checkpoint of the authors is loaded."""

    dtype: torch.dtype | None
    """Of the weights in memory; float32 by default, None that of most weights in the checkpoint."""
    image_size: int | None
    """None is the authors' 384, or the U-Net's own where that is smaller."""
    max_bytes: int
    """Largest pickled file that is opened."""


def load_stage1(
    checkpoint: str | Path, components: str | Path | Components, **options: Unpack[LoadOptions]
) -> VLVPipeline:
    """Load the authors' stage 1: encoder and diffusion decoder; see `load_official`."""
    return _load(checkpoint, components, stage=1, **options)[0]


def load_stage2(
    checkpoint: str | Path, components: str | Path | Components, **options: Unpack[LoadOptions]
) -> VLVPipeline:
    """Load the authors' stage 2: encoder, text tower and caption decoder; see `load_official`.

    U-Net and VAE, which its checkpoints do not hold, come from the component folders where their
    weights lie there; without them the model captions but does not reconstruct.
    """
    return _load(checkpoint, components, stage=2, **options)[0]


def load_official(
    checkpoint: str | Path, components: str | Path | Components, **options: Unpack[LoadOptions]
) -> tuple[VLVPipeline, Report]:
    """Load a checkpoint of the authors' code, of either stage.

    Args:
        checkpoint: A file in any form of `read_tensors`, or a folder with one. Wrappers such as
            ``module.`` before the names, bf16 and fp16 are fine.
        components: A folder that holds ``Florence2large``, ``stable-diffusion-2-1-base`` and
            ``Qwen2.5``, or the three folders. Their weights may be absent where the checkpoint has
            them.
        **options: See `LoadOptions`.

    Returns:
        The pipeline on the CPU, in eval mode, and what was read.

    Raises:
        CheckpointError: The checkpoint is unreadable, lacks a trained part, or does not fit.
        ModelFolderError: A component folder lacks what is needed.
    """
    return _load(checkpoint, components, **options)


def convert_official(
    checkpoint: str | Path,
    components: str | Path | Components,
    output: str | Path,
    *,
    references: Mapping[str, Reference] | None = None,
    origins: Mapping[str, Origin] | None = None,
    **options: Unpack[LoadOptions],
) -> Report:
    """Write the authors' checkpoint as an ordinary model folder: complete, or not at all.

    Args:
        checkpoint: See `load_official`.
        components: See `load_official`.
        output: New, empty, or an older model that is replaced.
        references: Components that the folder names instead of holding them.
        origins: Where each component comes from, for the card; by default what the component folders say.
        **options: See `load_official`; ``dtype`` is also that of the files.
    """
    check_replaceable(Path(output))
    pipe, report = _load(checkpoint, components, **options)
    origins = origins or _origins(pipe, components)
    card = model_card(Path(output).name, pipe.components, Provenance(origins))
    pipe.save_pretrained(output, card=card, references=references)
    return report


def _origins(pipe: VLVPipeline, components: str | Path | Components) -> dict[str, Origin]:
    """What was trained is under the checkpoint's licence, which no file tells; the rest is of the diffusion folder."""
    folders = components if isinstance(components, Components) else Components.at(components)
    origins = {part: origin_of(folders.diffusion, part) for part in pipe.components}
    for part, folder in (("encoder", folders.florence), ("caption_decoder", folders.llm)):
        origins[part] = Origin(origin_of(folder, part).bases) if folder else Origin()
    return origins


def _load(
    checkpoint: str | Path,
    components: str | Path | Components,
    stage: int | None = None,
    **options: Unpack[LoadOptions],
) -> tuple[VLVPipeline, Report]:
    folders = components if isinstance(components, Components) else Components.at(components)
    path = Path(checkpoint)
    tensors = read_tensors(path, max_bytes=options.get("max_bytes", PICKLE_LIMIT))
    dtype = options.get("dtype", torch.float32) or _stored_dtype(tensors)
    assembly = _Assembly(path, tensors, folders, dtype)
    report = assembly.report
    if stage is not None and report.stage != stage:
        raise CheckpointError(
            f"{path} is a checkpoint of stage {report.stage}; load it with "
            f"load_stage{report.stage} or load_official"
        )
    pipe = assembly.pipeline(options.get("image_size") or folders.image_size())
    level = logging.WARNING if report.unexpected or report.misshaped else logging.INFO
    logger.log(level, "%s: %s", path, "; ".join(line.strip() for line in report.lines()))
    return pipe, report


def _stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most numbers."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


@dataclass(frozen=True)
class _Entry:
    """One tensor of the checkpoint."""

    name: str
    """In the file."""
    tensor: Tensor


class _Assembly:
    """Builds the parts of the pipeline, taking each tensor from where it is to be had."""

    def __init__(
        self, path: Path, tensors: dict[str, Tensor], folders: Components, dtype: torch.dtype
    ) -> None:
        self.path, self.folders, self.dtype = path, folders, dtype
        self.report = Report(stage=2 if any(map(is_stage2, tensors)) else 1)
        self.entries: dict[str, _Entry] = {}
        self._folder_weights: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            self._add(name, tensor)
        self._check_essential(len(tensors))
        self._projector_shape = self._shape("language_proj.2.weight", 2)

    def _add(self, name: str, tensor: Tensor) -> None:
        key = canonical(name)
        if key is None:
            self.report.unexpected.append(name)
        elif is_unneeded(key):
            self.report.unneeded.append(name)
        elif key in self.entries:
            raise CheckpointError(
                f"{self.path} holds {self.entries[key].name} and {name}, which are the same tensor; "
                "remove one of the two sets"
            )
        else:
            self.entries[key] = _Entry(name, tensor)

    def _check_essential(self, count: int) -> None:
        if not self.entries:
            first = next(iter(self.report.unexpected), "nothing")
            raise CheckpointError(
                f"none of the {count} tensors in {self.path} (such as {first}) belongs to the "
                "authors' VLV; name a checkpoint of theirs"
            )
        needed = {
            k: v for stage in range(1, self.report.stage + 1) for k, v in ESSENTIAL[stage].items()
        }
        for prefix, what in needed.items():
            if not any(key.startswith(prefix) for key in self.entries):
                raise CheckpointError(
                    f"{self.path} has no {prefix.rstrip('.')}, {what}; name a complete checkpoint "
                    f"of stage {self.report.stage}"
                )

    # --- the parts -------------------------------------------------------------------------------

    def pipeline(self, image_size: int) -> VLVPipeline:
        """All parts; what is left over in the end was unexpected."""
        captions = self.report.stage == 2
        pipe = VLVPipeline(
            encoder=self._encoder(),
            text_encoder=self._text_encoder(),
            tokenizer=self.folders.tokenizer(),
            unet=self._diffusion_model("unet", optional=captions),
            vae=self._diffusion_model("vae", optional=captions),
            scheduler=self.folders.scheduler(),
            caption_decoder=self._caption_decoder() if captions else None,
            image_size=image_size,
            framing="resize",
        )
        self.report.unexpected += [entry.name for entry in self.entries.values()]
        return pipe

    def _encoder(self) -> VLVEncoder:
        positions = self._shape("model.language_model.model.decoder.embed_positions.weight", 2)
        config = self.folders.florence_config(positions[0] - 2)  # BART's offset
        with torch.device("meta"):
            shapes = _shapes(Florence2ForConditionalGeneration(config))
        names = {native: florence_names(native) for native in _untied(shapes)}
        state = self._state("encoder", {key: shapes[key] for key in names}, names)
        with quiet_loading():
            florence = Florence2ForConditionalGeneration.from_pretrained(
                None, config=config, state_dict=state, dtype=self.dtype
            )
        _, num_queries, _ = self._shape("query_embed", 3)
        text_width, _ = self._projector_shape
        vision = self.folders.vision()
        encoder = VLVEncoder.from_florence(
            florence,
            self.folders.florence_tokenizer(),
            num_queries=num_queries,
            text_width=text_width,
            image_size=vision.size,
            seed=0,
        )
        encoder.config.image_mean, encoder.config.image_std = vision.mean, vision.std
        width = shapes["model.language_model.shared.weight"][1]
        head = {"queries": (1, num_queries, width)} | _shapes(encoder.projector, "projector.")
        names = {key: (key.replace("projector", "language_proj"),) for key in head}
        state = self._state("encoder", head, names | {"queries": ("query_embed",)})
        encoder.queries = nn.Parameter(state.pop("queries"))
        encoder.projector.load_state_dict(
            {key.removeprefix("projector."): tensor for key, tensor in state.items()}
        )
        return encoder

    def _text_encoder(self) -> CLIPTextModel:
        config = self.folders.text_config()
        width, _ = self._projector_shape
        if config.hidden_size != width:
            raise CheckpointError(
                f"{self.path} writes embeddings of width {width}, but the text tower in "
                f"{self.folders.diffusion} reads {config.hidden_size}; name the one it was trained "
                "with"
            )
        with torch.device("meta"):
            shapes = _shapes(CLIPTextModel(config))
        names = {native: text_tower_names(native) for native in shapes}
        state = self._state("text_encoder", shapes, names)
        with quiet_loading():
            return CLIPTextModel.from_pretrained(
                None, config=config, state_dict=state, dtype=self.dtype
            )

    def _diffusion_model(self, part: str, *, optional: bool) -> Any:
        """U-Net or VAE; None where it is optional and nowhere to be had."""
        held = any(key.startswith(f"{part}.") for key in self.entries)
        if optional and not held and not self._weights(part):
            self.report.sources[part] = "absent"
            return None
        with torch.device("meta"):
            model = self.folders.diffusion_model(part)
        shapes = _shapes(model)
        names = {native: (f"{part}.{native}",) for native in shapes}
        model.load_state_dict(self._state(part, shapes, names), assign=True)
        return model

    def _caption_decoder(self) -> CaptionDecoder:
        config = self.folders.llm_config()
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            shapes = _shapes(kind(config))
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        names: dict[str, tuple[str, ...]] = {key: (f"qwen2_model.{key}",) for key in shapes}
        if config.tie_word_embeddings:
            names["model.embed_tokens.weight"] += ("qwen2_model.lm_head.weight",)
        state = self._state("caption_decoder", shapes, names)
        with quiet_loading():
            llm = kind.from_pretrained(
                None, config=config, state_dict=state, dtype=self.dtype, trust_remote_code=False
            )
        _, text_width = self._shape("mlp.layers.0.weight", 2)
        tokenizer = self.folders.llm_tokenizer()
        decoder = CaptionDecoder.from_llm(llm, tokenizer, text_width=text_width, seed=0)
        shapes = _shapes(decoder.mlp)
        names = {key: (f"mlp.layers.{key}",) for key in shapes}
        decoder.mlp.load_state_dict(self._state("caption_decoder", shapes, names))
        decoder.config.ends_by_itself = False
        return decoder

    # --- tensors ---------------------------------------------------------------------------------

    def _state(
        self, part: str, shapes: dict[str, tuple[int, ...]], names: Mapping[str, tuple[str, ...]]
    ) -> dict[str, Tensor]:
        """The tensors of a part by their names here, from the checkpoint or its folder."""
        state: dict[str, Tensor] = {}
        filled: list[str] = []
        for native, shape in shapes.items():
            trained = _is_trained(part, native)
            tensor = self._take(names[native], shape, trained)
            if tensor is None:
                if trained:
                    raise CheckpointError(
                        f"{self.path} lacks {names[native][0]}, which was trained; name a complete "
                        "checkpoint"
                    )
                tensor = self._from_folder(part, native, names[native], shape)
                filled.append(names[native][0])
            state[native] = tensor.to(self.dtype, copy=True)
        source = "checkpoint"
        if filled:
            source = "components"
            if len(filled) < len(shapes):
                source = "checkpoint and components"
                self.report.missing += filled
        self.report.sources.setdefault(part, source)
        return state

    def _take(self, names: tuple[str, ...], shape: tuple[int, ...], trained: bool) -> Tensor | None:
        """One tensor of the checkpoint; None where it has none that fits."""
        found = [self.entries.pop(name) for name in names if name in self.entries]
        if not found:
            return None
        entry, *copies = found
        for copy in copies:
            same = torch.equal(copy.tensor, entry.tensor)
            (self.report.unneeded if same else self.report.unexpected).append(copy.name)
        tensor = entry.tensor.T if names[0] in _TRANSPOSED else entry.tensor
        if tuple(tensor.shape) == shape and tensor.is_floating_point():
            self.report.used.append(entry.name)
            return tensor
        wrong = (
            f"{entry.name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, "
            f"expected {shape} of floats"
        )
        if trained:
            raise CheckpointError(
                f"{self.path} does not fit the component folders: {wrong}; name those that it was "
                "trained with"
            )
        self.report.misshaped.append(wrong)
        return None

    def _from_folder(
        self, part: str, native: str, names: tuple[str, ...], shape: tuple[int, ...]
    ) -> Tensor:
        """A frozen tensor from its component folder, under their name or ours."""
        weights = self._weights(part)
        for name in (names[0].removeprefix("model."), native):
            tensor = weights.get(name)
            if tensor is not None and names[0] in _TRANSPOSED and name != native:
                tensor = tensor.T
            if tensor is not None and tuple(tensor.shape) == shape:
                return tensor
        raise CheckpointError(
            f"neither {self.path} nor the component folder of the {part} has {names[0]} of shape "
            f"{shape}; put the weights of that model into its folder"
        )

    def _weights(self, part: str) -> dict[str, Tensor]:
        if part not in self._folder_weights:
            self._folder_weights[part] = self.folders.weights(part) or {}
        return self._folder_weights[part]

    def _shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """Shape of a trained tensor that tells a size of the model."""
        entry = self.entries.get(key)
        if entry is None or entry.tensor.ndim != ndim:
            raise CheckpointError(
                f"{self.path} lacks a {key} of {ndim} dimensions; name a complete checkpoint"
            )
        return tuple(entry.tensor.shape)


_TRANSPOSED = {"model.image_projection"}


def _is_trained(part: str, native: str) -> bool:
    """Whether the authors' training changes a tensor, so that only the checkpoint can have it."""
    if part == "encoder":
        return not native.startswith(("model.vision_tower.", "model.multi_modal_projector."))
    return part == "caption_decoder"


def _shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _untied(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Florence-2's tensors without those that are tied to the token embedding."""
    tied = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return [key for key in shapes if not key.endswith(tied)]
