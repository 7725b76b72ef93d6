"""The tour as a page: a trace of one image, its pictures, and the words around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tools.tour import pictures
from tools.tour.trace import NUM_DRAWS, Captioning, Drawing, Encoding, caption, draw, encode
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene
from vlv.toyworld.writing import describe

if TYPE_CHECKING:
    from torch import Tensor

    from vlv.models.pipeline import VLVPipeline

TOUR_NAME = "tour.md"
TEMPLATE = Path(__file__).with_name("template.md")
PICTURES = "images/tour"
SCENE_INDEX = 2
"""The scene of the split "test" that is followed: two solids, in colour."""


@dataclass(frozen=True, slots=True)
class TourSettings:
    """What the tour depends on, besides the model."""

    model: str
    """Its name, for the reader."""
    seed: int = 0
    """Of the scene and of the noise."""
    steps: int = 20
    guidance: float = 2.0
    max_new_tokens: int = 300
    """Longest caption."""


def write_tour(pipe: VLVPipeline, folder: Path, settings: TourSettings) -> Path:
    """Follow one image through a model; write the page and its pictures.

    Args:
        pipe: A complete model.
        folder: Where ``tour.md`` and ``images/tour/`` go.
        settings: Model name, seed, sampling.

    Returns:
        The page.
    """
    scene = sample_scene(settings.seed, SCENE_INDEX, "test")
    truth = describe(scene, "detailed", np.random.default_rng(settings.seed))
    image = Image.fromarray(render(scene).image)
    encoding = encode(pipe, image)
    words = caption(pipe, encoding.c, truth, max_new_tokens=settings.max_new_tokens)
    drawing = draw(
        pipe,
        encoding,
        truth,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
    )
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for name, picture in _pictures(image, encoding, words, drawing).items():
        picture.save(folder / PICTURES / f"{name}.png")
    parts = _encoding_part(encoding) | _words_part(words) | _drawing_part(drawing)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        parts,
        model=settings.model,
        letters=_letters(encoding, words, drawing),
        pictures=PICTURES,
        side=pipe.image_size,
        truth=truth,
        seed=settings.seed,
        steps=settings.steps,
        guidance=f"{settings.guidance:g}",
    )
    page = folder / TOUR_NAME
    page.write_text(text, encoding="utf-8")
    return page


def tensor_table(*tensors: tuple[str, str, Tensor]) -> str:
    """A table of tensors, each with its name and what it is."""
    head = "| tensor | what | shape | type | mean | std |\n|---|---|---|---|---:|---:|"
    return "\n".join([head, *(_tensor_row(*entry) for entry in tensors)])


def _tensor_row(name: str, what: str, tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    known = tensor.is_floating_point()
    numbers = f"{_figure(tensor.mean())} | {_figure(tensor.std())}" if known else " | "
    return f"| {name} | {what} | {shape} | {kind} | {numbers} |"


def _figure(value: Tensor | float) -> str:
    """Three digits after the point; no minus before a zero."""
    return f"{round(float(value), 3) + 0.0:.3f}"


def _letters(encoding: Encoding, words: Captioning, drawing: Drawing) -> str:
    tokens, places = encoding.features.shape[1], encoding.inputs.shape[1]
    k, h, w = drawing.latents.shape[1:]
    rows = [
        ("B", "batch", 1),
        ("N", "image tokens", tokens),
        ("P", "prompt tokens", places - tokens),
        ("Q", "queries, the length of z", encoding.z.shape[1]),
        ("d", "width of Florence-2", encoding.features.shape[2]),
        ("D", "width of the text tower", encoding.z.shape[2]),
        ("E", "width of the language model", words.e.shape[2]),
        ("T", "tokens of the caption, with the end token", words.ids.shape[1]),
        ("k, h, w", "latents", f"{k}, {h}, {w}"),
    ]
    return "\n".join(f"| {letter} | {meaning} | {value} |" for letter, meaning, value in rows)


def _encoding_part(encoding: Encoding) -> dict[str, str]:
    return {
        "t_pixels": tensor_table(("pixels", "the image", encoding.pixels)),
        "t_features": tensor_table(
            ("feature map", "of the vision tower", encoding.vision),
            ("v'", "image tokens", encoding.features),
        ),
        "t_memory": tensor_table(
            ("X", "image tokens and prompt", encoding.inputs),
            ("h_E", "encoder states", encoding.memory),
        ),
        "t_hidden": tensor_table(
            ("queries", "learned, the same for every image", encoding.queries),
            ("ĥ", "decoder states", encoding.hidden),
        ),
        "t_z": tensor_table(("**z**", "caption embedding", encoding.z)),
        "t_c": tensor_table(("**c**", "context", encoding.c.sequence)),
    }


def _words_part(words: Captioning) -> dict[str, str]:
    ended = words.caption.finished
    return {
        "t_caption": tensor_table(
            ("**e**", "prefix", words.e), ("tokens", "ids, with the end token", words.ids)
        ),
        "caption": " ".join(words.caption.text.split()),
        "finished": "" if ended else ", stopped at its longest length",
        "pieces": " ".join(_code(piece) for piece in words.pieces),
        "own_loss": _figure(words.own_loss),
        "true_loss": _figure(words.true_loss),
    }


def _code(piece: str) -> str:
    """A token as inline code, its spaces visible."""
    return "`" + "·".join(piece.replace("`", "'").split(" ")).replace("\n", "⏎") + "`"


def _drawing_part(drawing: Drawing) -> dict[str, str]:
    first, *_, last = drawing.moments
    timesteps = [str(moment.timestep) for moment in drawing.moments[:-1]]
    return {
        "t_latents": tensor_table(
            ("posterior mean", "of the VAE", drawing.mean),
            ("posterior std", "of the VAE", drawing.std),
            ("x", "latents: the mean times the latent scale", drawing.latents),
        ),
        "num_draws": str(NUM_DRAWS),
        "losses": "\n".join(
            f"| {name} | {_figure(loss)} |" for name, loss in drawing.losses.items()
        ),
        "t_sampling": tensor_table(
            ("x_T", "pure noise", first.latents),
            ("prediction", "of the U-Net at the first step, given c", drawing.prediction),
            ("x_0", "latents at the end", last.latents),
        ),
        "timesteps": ", ".join(timesteps) + ", and the end",
    }


def _pictures(
    image: Image.Image, encoding: Encoding, words: Captioning, drawing: Drawing
) -> dict[str, Image.Image]:
    moments = drawing.moments
    latents = [pictures.latent_map(moment.latents[0]) for moment in moments]
    decoded = [pictures.enlarge(moment.picture, latents[0].width) for moment in moments]
    results = (image, drawing.through_vae, drawing.image)
    return {
        "image": pictures.enlarge(image),
        "features": pictures.token_map(encoding.features[0]),
        "z": pictures.heat_map(encoding.z[0]),
        "c": pictures.heat_map(encoding.c.sequence[0]),
        "e": pictures.heat_map(words.e[0]),
        "sampling": pictures.grid([latents, decoded]),
        "result": pictures.grid([[pictures.enlarge(picture) for picture in results]]),
    }
