"""VLVPipeline: image to caption embedding, to image, to caption; and embeddings mixed.

Shapes: B batch, Q queries, D text width, H W pixels.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor

from vlv.data.framing import DEFAULT_FRAMING, Framing, check_framing
from vlv.data.images import to_pil
from vlv.errors import ConfigError, MissingPartError, ModelFolderError
from vlv.models.batching import chunks
from vlv.models.captioner import Caption
from vlv.models.card import CARD_NAME, model_card, named_parts, read_card, rename_card
from vlv.models.context import Context
from vlv.models.diffusion import DiffusionDecoder, Sampler
from vlv.models.folder import (
    COMPONENTS,
    MORE_COMPONENTS,
    Reference,
    Task,
    check_parts,
    default_image_size,
    find_folder,
    load_component,
    read_index,
)
from vlv.models.hub import upload
from vlv.models.mixing import MixMode, mix_embeddings
from vlv.models.pixels import as_batch, as_list, is_single
from vlv.models.placement import at_work
from vlv.models.saving import index_entry, write_atomically, write_component, write_index
from vlv.models.two_towers import make_diffusion_decoder

logger = logging.getLogger(__name__)


class VLVPipeline(DiffusionPipeline):
    """The Vision-Language-Vision auto-encoder as one object.

    Every component is optional: captioning needs no U-Net, reconstruction no language model. A
    method that lacks one says so with a MissingPartError. Wherever images are taken, one image
    gives one result and a list gives a list; images are PIL images, paths, arrays (H, W, 3) or
    tensors (3, H, W), and are brought to squares of `image_size`.

    Args:
        encoder: VLVEncoder.
        text_encoder: CLIPTextModel, the text tower T.
        tokenizer: Its tokenizer.
        unet: UNet2DConditionModel.
        vae: AutoencoderKL.
        scheduler: The noise schedule the U-Net was trained with.
        caption_decoder: CaptionDecoder.
        image_size: Side in pixels that images are brought to; None is that of the denoiser.
        framing: How images of other shapes become squares, see `vlv.data.framing.frame`.
        text_encoder_2, tokenizer_2: Second text tower, of SDXL and Stable Diffusion 3.
        text_encoder_3, tokenizer_3: The T5 of Stable Diffusion 3.
        transformer: SD3Transformer2DModel, which Stable Diffusion 3 has instead of a U-Net.
    """

    encoder: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    vae: Any
    scheduler: Any
    caption_decoder: Any
    transformer: Any

    model_cpu_offload_seq: Any = (
        "encoder->text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    )
    _optional_components = [*COMPONENTS, *MORE_COMPONENTS]  # noqa: RUF012

    def __init__(
        self,
        encoder: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        unet: Any = None,
        vae: Any = None,
        scheduler: Any = None,
        caption_decoder: Any = None,
        image_size: int | None = None,
        framing: Framing = DEFAULT_FRAMING,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        transformer: Any = None,
    ) -> None:
        super().__init__()
        parts = (encoder, text_encoder, tokenizer, unet, vae, scheduler, caption_decoder)
        more = (text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3, transformer)
        named = zip((*COMPONENTS, *MORE_COMPONENTS), (*parts, *more), strict=True)
        self.register_modules(**dict(named))  # type: ignore[no-untyped-call]
        check_framing(framing)
        self.register_to_config(  # type: ignore[no-untyped-call]
            image_size=image_size, framing=framing
        )
        self.references: dict[str, Reference] = {}
        self.card: str | None = None  # README.md of the folder it was loaded from
        # where parts go while they work; see `place`
        self.offload_device: torch.device | None = None
        self._decoder: tuple[dict[str, Any], DiffusionDecoder] | None = None
        for part in self._parts().values():
            if isinstance(part, torch.nn.Module):
                part.eval()

    # --- loading and saving ----------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_folder: str | Path,
        *,
        parts: Iterable[Task] | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> VLVPipeline:
        """Load a model onto the CPU, in eval mode.

        Args:
            name_or_folder: A model folder, the name of a shipped model, or ``owner/name`` on the hub (the network is used).
            parts: What it is for, any of "caption", "reconstruct", "generate", "embed": only the components that these
                need are loaded. None loads all that the model has.
            revision: Of a model on the hub.
            dtype: Of the weights in memory, whatever the files hold; the VAE is always float32.
            local_files_only: Take a model on the hub from the cache.

        Returns:
            The pipeline.

        Raises:
            ModelFolderError: There is no such model, or it is incomplete or damaged.
            MissingPartError: It lacks a component that `parts` need.
        """
        tasks = None if parts is None else list(parts)
        folder = find_folder(
            name_or_folder, tasks=tasks, revision=revision, local_files_only=local_files_only
        )
        index = read_index(folder)
        names = list(index.components) if tasks is None else index.require(tasks)
        loaded = {
            name: load_component(index, name, dtype, local_files_only=local_files_only)
            for name in names
        }
        size = index.image_size or default_image_size(index)
        pipe = cls(**loaded, image_size=size, framing=index.framing)
        pipe.references = {k: v for k, v in index.components.items() if v is not None}
        pipe.card = read_card(folder)
        pipe.register_to_config(_name_or_path=str(name_or_folder))  # type: ignore[no-untyped-call]
        return pipe

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        references: Mapping[str, Reference] | None = None,
        card: str | None = None,
    ) -> None:
        """Write a model folder: complete, or not at all.

        Args:
            folder: New, empty, or an older model that is replaced.
            dtype: Of the weights in the files (``torch.float16`` halves them); None keeps that in memory.
            references: Components that are named instead of copied; None keeps those the model was loaded with.
            card: Text of README.md; None keeps that of the replaced or the loaded folder, or writes one.

        Raises:
            OutputError: The folder holds something else, or a weight does not fit the dtype.
        """
        folder = Path(folder)
        references = self.references if references is None else references
        parts = self._parts()
        name = folder.resolve().name
        text = card or read_card(folder) or self._card(name, references)

        def write(temporary: Path) -> None:
            entries: dict[str, Any] = {name: [None, None] for name in COMPONENTS}
            for name, component in parts.items():
                if name in references:
                    entries[name] = dict(references[name])
                elif component is not None:
                    write_component(component, temporary / name, dtype)
                    entries[name] = index_entry(component)
            extra = {"image_size": self._known_image_size(), "framing": self.framing}
            write_index(temporary, type(self).__name__, entries, extra)
            (temporary / CARD_NAME).write_text(text, encoding="utf-8")

        write_atomically(folder, write)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        card: str | None = None,
        commit_message: str = "Upload VLVPipeline",
    ) -> str:
        """Upload the model with its card.

        Args:
            repo_id: ``owner/name``; created where it does not exist.
            private: Of a created repository.
            token: Of the hub; None is the stored login.
            dtype: Of the uploaded weights.
            card: Text of README.md; None is that of the loaded folder, or one from what is known.
            commit_message: Of the upload.

        Returns:
            Address of the commit.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            text = card or self._card(repo_id, self.references)
            self.save_pretrained(folder, dtype=dtype, card=text)
            return upload(folder, repo_id, commit_message, private=private, token=token)

    # --- properties ------------------------------------------------------------------------------

    @property
    def image_size(self) -> int:
        """Side in pixels that images are brought to."""
        size = self._known_image_size()
        if size is None:
            raise ModelFolderError(
                f"the image size of {self._name()} is unknown: it has no denoiser and VAE that tell; "
                "pass image_size to VLVPipeline"
            )
        return size

    @property
    def framing(self) -> Framing:
        """How images of other shapes become squares: "cut" or "resize" first."""
        return cast("Framing", self.config["framing"])

    @property
    def decoder(self) -> DiffusionDecoder:
        """The components of the diffusion model as one module, built when one of them has changed."""
        parts = self._parts()
        if self._decoder is None or any(parts[k] is not v for k, v in self._decoder[0].items()):
            self._decoder = parts, make_diffusion_decoder(parts)
        return self._decoder[1]

    def _known_image_size(self) -> int | None:
        if (size := self.config["image_size"]) is not None:
            return int(size)
        if (self.unet is None and self.transformer is None) or self.vae is None:
            return None
        return self.decoder.image_size

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*COMPONENTS, *MORE_COMPONENTS)}

    def _card(self, name: str, references: Mapping[str, Reference]) -> str:
        if self.card is not None:
            return rename_card(self.card, name)
        return model_card(name, self._parts(), named_parts(references))

    def _name(self) -> str:
        return str(self.config.get("_name_or_path") or "in memory")

    def _require(self, task: Task, *, given_z: bool = False) -> None:
        """Check the components of a task; where z is given the encoder is not needed."""
        present = [name for name, component in self._parts().items() if component is not None]
        check_parts(
            f"the model {self._name()}, as it was loaded,",
            task,
            [*present, "encoder"] if given_z else present,
        )

    def _embedding(self, images: Any, z: Tensor | None, batch_size: int) -> Tensor:
        """(B, Q, D) from either argument."""
        if (images is None) == (z is None):
            raise ConfigError(
                "give either images or a caption embedding z=, not both and not neither"
            )
        if z is None:
            return self.embed(as_list(images), batch_size=batch_size)
        return z if z.ndim == 3 else z[None]

    # --- image to embedding ----------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, images: Any, *, batch_size: int = 16, progress: bool = False) -> Tensor:
        """Encode images.

        Args:
            images: One image or several.
            batch_size: Images encoded together.
            progress: Show a bar on stderr.

        Returns:
            The caption embedding z: (Q, D) for one image, (B, Q, D) for several.
        """
        self._require("embed")
        square = (self.image_size, self.framing)
        with at_work(self, "encoder"):
            z = torch.cat(
                [
                    self.encoder(as_batch(chunk, *square).to(self.encoder.device))
                    for chunk in chunks(as_list(images), batch_size, progress, "encoding")
                ]
            )
        return z[0] if is_single(images) else z

    def read_tokens(self, images: Any = None, *, z: Tensor | None = None) -> list[str]:
        """What a discrete bottleneck says of images or caption embeddings, as texts; see `ImageEncoder.token_ids`."""
        if self.tokenizer is None:
            raise MissingPartError("tokens need the text tower's tokenizer; load it with the model")
        return list(self.encoder.token_texts(self._embedding(images, z, 16), self.tokenizer))

    @torch.no_grad()
    def context(self, z: Tensor) -> Context:
        """From caption embeddings to contexts, (B, Q, D), or (Q, D) for one."""
        with at_work(self, *self.decoder.towers):
            z = z.to(self.text_encoder.device, self.text_encoder.dtype)
            return self.decoder.context(z if z.ndim == 3 else z[None])

    def mix(
        self,
        items: Sequence[Any],
        *,
        keep: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        mode: MixMode = "concat",
    ) -> Tensor:
        """Mix images, or caption embeddings, into one caption embedding; see `mix_embeddings`.

        Args:
            items: Images and caption embeddings (Q, D), in any combination.
            keep: Leading tokens kept of each, for "concat".
            weights: For "average" and "slerp".
            mode: How to mix.

        Returns:
            z, to be handed to `reconstruct` or `caption` as ``z=``.
        """
        zs = [x if isinstance(x, Tensor) and x.ndim == 2 else self.embed(x) for x in items]
        return mix_embeddings(zs, keep=keep, weights=weights, mode=mode)

    # --- embedding to caption --------------------------------------------------------------------

    def caption(self, images: Any = None, *, z: Tensor | None = None, **settings: Any) -> Any:
        """Describe images, or caption embeddings, in words.

        Args:
            images: One image or several.
            z: Instead of images, (Q, D) or (B, Q, D).
            **settings: As in `describe`.

        Returns:
            A str for one image, a list of str for several.
        """
        captions = self.describe(images, z=z, **settings)
        single = is_single(images) if z is None else z.ndim == 2
        return captions[0].text if single else [caption.text for caption in captions]

    def describe(
        self,
        images: Any = None,
        *,
        z: Tensor | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **generation: Any,
    ) -> list[Caption]:
        """Like `caption`, with the number of tokens and whether the caption ended by itself.

        Args:
            images: One image or several.
            z: Instead of images, (Q, D) or (B, Q, D).
            batch_size: Captions written together.
            progress: Show a bar on stderr.
            **generation: As in `CaptionDecoder.generate`: max_new_tokens, num_beams, do_sample, ...

        Returns:
            One Caption per image.
        """
        self._require("caption", given_z=z is not None)
        z = self._embedding(images, z, batch_size)
        captions: list[Caption] = []
        c = torch.cat([self.context(chunk).sequence for chunk in chunks(z, batch_size, False, "")])
        with at_work(self, "caption_decoder"):
            for chunk in chunks(c, batch_size, progress, "captioning"):
                captions += self.caption_decoder.generate(chunk, **generation)
        return captions

    # --- embedding or text to image --------------------------------------------------------------

    def reconstruct(
        self,
        images: Any = None,
        *,
        z: Tensor | None = None,
        batch_size: int = 16,
        **sampling: Any,
    ) -> Any:
        """Rebuild images from their caption embeddings alone.

        Args:
            images: One image or several.
            z: Instead of images, (Q, D) or (B, Q, D).
            batch_size: Images drawn together.
            **sampling: As in `draw`: seed, steps, guidance, sampler, progress.

        Returns:
            A PIL image for one, a list for several.
        """
        self._require("reconstruct", given_z=z is not None)
        single = is_single(images) if z is None else z.ndim == 2
        z = self._embedding(images, z, batch_size)
        pictures = self.draw(self.context(z), batch_size=batch_size, **sampling)
        return pictures[0] if single else pictures

    def generate(self, texts: str | Sequence[str], **sampling: Any) -> Any:
        """Draw images from text with the same frozen decoder.

        Args:
            texts: One text or several. Text beyond the text tower's length is cut, with a warning.
            **sampling: As in `draw`.

        Returns:
            A PIL image for one text, a list for several.
        """
        self._require("generate")
        single = isinstance(texts, str)
        with at_work(self, *self.decoder.towers):
            encoded = self.decoder.encode_text([texts] if isinstance(texts, str) else list(texts))
        if encoded.num_truncated:
            logger.warning(
                "%d of %d texts are longer than the text tower's %d tokens and were cut",
                encoded.num_truncated,
                len(encoded.c),
                self.decoder.num_positions,
            )
        pictures = self.draw(encoded.c, **sampling)
        return pictures[0] if single else pictures

    def draw(
        self,
        c: Context,
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        guidance: float = 2.0,
        sampler: Sampler = "dpm",
        batch_size: int = 16,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draw one image per context.

        Args:
            c: B contexts.
            seed: One for all images, each of which then starts from the same noise, or one per image.
            steps: Sampler steps.
            guidance: Classifier-free guidance; 1 is none.
            sampler: "dpm", "ddim" or "ddpm".
            batch_size: Images drawn together.
            progress: Show a bar on stderr.

        Returns:
            B images of `image_size`.
        """
        seeds = [seed] * len(c) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(c):
            raise ConfigError(f"{len(c)} images need as many seeds, got {len(seeds)}")
        pictures: list[Image.Image] = []
        with at_work(self, *self.decoder.components):
            for rows in chunks(range(len(c)), batch_size, progress, "drawing"):
                pixels = self.decoder.sample(
                    c[rows.start : rows.stop],
                    seeds=seeds[rows.start : rows.stop],
                    steps=steps,
                    guidance=guidance,
                    sampler=sampler,
                    height=self.image_size,
                    width=self.image_size,
                )
                pictures += [to_pil(picture) for picture in pixels]
        return pictures


# so that DiffusionPipeline.from_pretrained finds the class that a model folder names
setattr(diffusers, VLVPipeline.__name__, VLVPipeline)
