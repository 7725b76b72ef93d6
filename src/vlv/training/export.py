"""The finished model as a folder: all of it, or where adapters train these alone, and their base if it is in no one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlv.config import PartSource, RunConfig
from vlv.errors import ConfigError
from vlv.models.adapter import base_of, save_adapter
from vlv.models.card import Provenance, model_card
from vlv.models.folder import INDEX_NAME, default_image_size, load_components, read_index
from vlv.models.pipeline import VLVPipeline
from vlv.training.parts import (
    decoder_index,
    encoder_folder,
    framing_of,
    model_around,
    part_folder,
)

if TYPE_CHECKING:
    from vlv.training.assemble import Parts


@dataclass(frozen=True)
class Results:
    """Where the results of a run go."""

    run_dir: Path
    export: Path | None = None
    """Of the whole model; None is `run_dir/model`, and nowhere where adapters train."""

    @property
    def model(self) -> Path:
        """The whole model."""
        return self.export or self.run_dir / "model"

    @property
    def adapter(self) -> Path:
        """What adapters learnt."""
        return self.run_dir / "adapter"

    @property
    def base(self) -> Path:
        """What they belong to, where the run started from several folders."""
        return self.run_dir / "base"


def save_result(
    config: RunConfig,
    parts: Parts,
    load_parts: Callable[[], Parts],
    results: Results,
    known: Provenance,
) -> None:
    """Save what a finished run has made.

    Args:
        config: The run.
        parts: As they were trained.
        load_parts: Loads them as they were before.
        results: Where it goes.
        known: Of the finished model.
    """
    if config.lora is None:
        export_model(config, parts, results.model, known)
        return
    if parts.caption_decoder is None:
        raise ConfigError(f"{config.stage} needs a caption decoder")
    folder = common_folder(config)
    if folder is None:
        folder, before = results.base, replace(known, trainings=known.trainings[:-1])
        export_model(config, load_parts(), folder, before)
    base = base_of(read_index(folder), _shown(config, folder, results))
    save_adapter(results.adapter, parts.encoder, parts.caption_decoder, base, known.trainings[-1])
    if results.export is not None:
        merged = VLVPipeline.from_pretrained(folder, adapter=results.adapter)
        merged.save_pretrained(results.export)


def common_folder(config: RunConfig) -> Path | None:
    """The model folder from which all parts of a run come, which sees images as the run does; None where there is none."""
    source, folder = config.model.caption_decoder, encoder_folder(config)
    if source is None or folder is None or not (folder / INDEX_NAME).is_file():
        return None
    others = (
        model_around(part_folder(source, None), "caption_decoder"),
        part_folder(config.model.decoder, ["generate"]),
    )
    index = read_index(folder)
    size = index.image_size or default_image_size(index)
    alike = (size, index.framing) == (config.data.image_size, framing_of(config))
    return folder if alike and all(x.resolve() == folder.resolve() for x in others) else None


def _shown(config: RunConfig, folder: Path, results: Results) -> str:
    """What a base is called, without the folders of this machine."""
    source: PartSource | None = config.model.caption_decoder
    if folder == results.base or source is None:
        return folder.name
    return Path(source.path).name if Path(source.path).is_dir() else source.path


def make_pipeline(config: RunConfig, parts: Parts, **decoder: object) -> VLVPipeline:
    """The parts as a pipeline; ``decoder`` supplies components other than those that training used."""
    names = parts.decoder.components
    components = {name: getattr(parts.decoder, name) for name in names} | decoder
    return VLVPipeline(
        encoder=parts.encoder,
        caption_decoder=parts.caption_decoder,
        image_size=config.data.image_size,
        framing=framing_of(config),
        **components,
    )


def export_model(config: RunConfig, parts: Parts, folder: Path, known: Provenance) -> None:
    """Save the model folder with its card; a decoder from the hub is named in it, one from a folder is copied."""
    source = config.model.decoder
    names = parts.decoder.components
    if Path(source.path).is_dir():
        index = decoder_index(source, names)
        copied = load_components(index, names, torch.float32)
        pipe = make_pipeline(config, parts, **copied)
        pipe.save_pretrained(folder, card=model_card(folder.name, pipe.components, known))
        return
    references = {
        name: {
            "repo": source.path,
            "subfolder": f"{source.subfolder}/{name}" if source.subfolder else name,
            "revision": source.revision,
            **({"variant": source.variant} if source.variant else {}),
        }
        for name in names
    }
    pipe = make_pipeline(config, parts)
    card = model_card(folder.name, pipe.components, known)
    pipe.save_pretrained(folder, references=references, card=card)
