"""What the model of pictograms can do: `python -m examples.pictograms.measure MODEL --root OUT --split test --json FILE`.

Names, on pictures of concepts that training has seen in a hand that it has not (`style`), of unseen concepts in seen hands
(`concepts`) and of unseen concepts in the unseen hand (`both`); reconstructions and blends, by retrieval with EfficientNet's
features. Baselines: the name of the nearest training picture, chance, and pictures drawn from the caption's words.
Shapes: N pictures, G gallery, F features.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from examples.pictograms.concepts import read_concepts
from examples.pictograms.fetch import packages
from examples.pictograms.judges import Features, PictureJudge, TextJudge
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlv import VLVPipeline
from vlv.data.loader import LoaderSettings
from vlv.data.records import Record
from vlv.data.source import find_records
from vlv.errors import VLVError
from vlv.evaluation.statistics import estimate, mean
from vlv.progress import say
from vlv.storage import Json, write_json
from vlv.training.caches import features_cache, fill_cache

SEED = 3001
"""Of the draw of pictures, of pairs, of the sampler and of the bootstrap; never used in tuning."""
BEAMS = 5
NEAREST = 10
"""Of a blend: its parents are looked for among so many of the gallery."""

PERMISSIVE = {
    str(style.style) for style in packages("pictures") if style.licence in ("Apache-2.0", "MIT")
}
"""Hands whose pictures a contact sheet may show."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    names: int = 300
    """Most pictures of a set whose names are asked for."""
    drawn: int = 100
    """Most pictures of a set that are reconstructed; as many are drawn from captions."""
    blends: int = 60
    steps: int = 12
    guidance: float = 2.0
    seed: int = SEED


@dataclass(frozen=True, slots=True)
class Pictures:
    """A set of pictures with what is known about them."""

    images: list[Image.Image]
    labels: list[str]
    features: Features
    """The judge's."""
    styles: list[str]
    z: Tensor
    """The model's, (N, Q, D)."""

    def head(self, count: int) -> Pictures:
        """The first of them."""
        first = slice(count)
        return Pictures(*(getattr(self, field.name)[first] for field in fields(self)))


class Bench:
    """A model, its judges, and the figures so far."""

    def __init__(self, model: Path, root: Path, samples: str, settings: Settings) -> None:
        self.pipe = VLVPipeline.from_pretrained(str(model))
        self.root, self.settings = root, settings
        self.judge, self.texts = PictureJudge(root / "backbone"), TextJudge(root / "packages")
        self.all_labels = [concept.label for concept in read_concepts(root / "packages")]
        self.figures: dict[str, Json] = {}
        self.shown: dict[str, list[Image.Image]] = {}
        self.captions: dict[str, list[list[str]]] = {}
        self.known = self._training_pictures(samples)

    def read(self, name: str) -> Pictures:
        """Pictures of a set, drawn by the seed where it has more than are wanted."""
        records = find_records([str(self.root / "pictures" / name)])
        return self._pictures(_some(records, self.settings.names, self.settings.seed))

    def _training_pictures(self, samples: str) -> Pictures:
        """What both stages have seen, with the judge's features by way of the cache that they read."""
        records = find_records([samples])
        encoder = self.pipe.encoder
        assert encoder is not None
        settings = LoaderSettings(batch_size=64, image_size=self.pipe.image_size, num_workers=1)
        rows = fill_cache(features_cache(encoder), records, self.root / "features", settings)
        (tokens,) = rows.values()
        stacked = torch.from_numpy(np.stack([tokens[i] for i in range(len(records))]))
        labels = [str(record.caption) for record in records]
        return Pictures([], labels, self.judge.of_tokens(stacked), [], torch.empty(0))

    def _pictures(self, records: Sequence[Record]) -> Pictures:
        images = [record.load() for record in records]
        labels = [str(record.caption) for record in records]
        styles = [str((record.meta or {})["style"]) for record in records]
        return Pictures(images, labels, self.judge(images), styles, self.pipe.embed(images))

    def show(self, name: str, images: Sequence[Image.Image], styles: Sequence[set[str]]) -> None:
        """Keep the pictures that may be shown anywhere: made from hands of permissive licences alone."""
        pairs = zip(images, styles, strict=True)
        self.shown[name] = [image for image, hands in pairs if hands <= PERMISSIVE]

    def note(self, name: str, values: object, unit: str = "share") -> None:
        """Keep the mean of values, one for each picture or pair, with its interval."""
        found = estimate(np.asarray(values, np.float64), mean, self.settings.seed)
        self.figures[name] = asdict(found) | {"unit": unit}
        say(f"{name}: {found.value:.3f} ({found.low:.3f} to {found.high:.3f}, n = {found.n})")

    # --- names -----------------------------------------------------------------------------------

    def names(self, name: str, found: Pictures) -> None:
        """Captions against labels, beside the nearest training picture and chance."""
        written = self.pipe.describe(z=found.z, max_new_tokens=24)
        captions = [caption.text.strip() for caption in written]
        guesses = self._guesses(found.z)
        near = self.nearest(found.features)
        labels = found.labels
        self.note(f"{name}: name right at 1", _equal(captions, labels))
        self.note(
            f"{name}: name right at 5",
            [a in {c, *g} for a, c, g in zip(labels, captions, guesses, strict=True)],
        )
        self.note(
            f"{name}: nearest picture's name right at 1", _equal([n[0] for n in near], labels)
        )
        self.note(
            f"{name}: nearest pictures' names right at 5",
            [a in n[:5] for a, n in zip(labels, near, strict=True)],
        )
        self._similarities(name, labels, captions, [n[0] for n in near])
        self.note(f"{name}: captions that end by themselves", [c.finished for c in written])
        known = set(self.all_labels)
        self.note(f"{name}: captions that are one of all names", [c in known for c in captions])
        self.captions[name] = [list(row) for row in zip(labels, captions, strict=True)]

    def _similarities(
        self, name: str, labels: Sequence[str], captions: Sequence[str], near: Sequence[str]
    ) -> None:
        """MiniLM's cosine between label and caption, nearest picture's name, and the caption of another picture."""
        truth, said, nearest = (self.texts(texts) for texts in (labels, captions, near))
        other = np.roll(said, 1, axis=0)
        own = (truth * said).sum(1)
        self.note(f"{name}: similarity of caption and label", own, "cosine")
        self.note(
            f"{name}: similarity of nearest name and label", (truth * nearest).sum(1), "cosine"
        )
        self.note(f"{name}: similarity by chance", (truth * other).sum(1), "cosine")
        self.note(f"{name}: caption above nearest name", own - (truth * nearest).sum(1), "cosine")

    @torch.no_grad()
    def _guesses(self, z: Tensor, batch_size: int = 32) -> list[list[str]]:
        """The likeliest captions of each picture, by beam search."""
        decoder = self.pipe.caption_decoder
        assert decoder is not None
        end = decoder.tokenizer.eos_token_id
        guesses: list[list[str]] = []
        for part in z.split(batch_size):
            ids = decoder.llm.generate(
                inputs_embeds=decoder.prefix(self.pipe.context(part).sequence),
                attention_mask=torch.ones(part.shape[:2], dtype=torch.long),
                num_beams=2 * BEAMS,
                num_return_sequences=BEAMS,
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
            texts = decoder.tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts = [text.strip() for text in texts]
            guesses += [texts[i : i + BEAMS] for i in range(0, len(texts), BEAMS)]
        return guesses

    def nearest(self, features: Features) -> list[list[str]]:
        """Names of training pictures, the nearest first, each name once."""
        order = np.argsort(-(features @ self.known.features.T), axis=1)[:, :100]
        return [list(dict.fromkeys(self.known.labels[i] for i in row)) for row in order]

    # --- pictures --------------------------------------------------------------------------------

    def reconstructions(self, name: str, found: Pictures) -> None:
        """Whether the reconstruction's nearest picture of the set is its original, and how close the pixels are."""
        pipe, settings = self.pipe, self.settings
        gallery, found = found, found.head(settings.drawn)
        drawn = pipe.reconstruct(z=found.z, **self.drawing(len(found.z)))
        self.note(f"{name}: reconstruction finds its original", self._finds(drawn, gallery))
        self.note(
            f"{name}: reconstruction finds its concept in training pictures",
            _equal([n[0] for n in self.nearest(self.judge(drawn))], found.labels),
        )
        self.note(f"{name}: PSNR of reconstructions", _psnr(drawn, found.images), "dB")
        captions = [row[1] for row in self.captions[name][: settings.drawn]]
        generated = pipe.generate(captions, **self.drawing(len(captions)))
        self.note(
            f"{name}: picture from the caption finds the original", self._finds(generated, gallery)
        )
        styles = [{style} for style in found.styles]
        self.show(f"{name}-original", found.images, styles)
        self.show(f"{name}-rebuilt", drawn, styles)
        self.show(f"{name}-generated", generated, styles)

    def drawing(self, count: int) -> Json:
        """How pictures are sampled: each from noise of its own."""
        steps, guidance, first = self.settings.steps, self.settings.guidance, self.settings.seed
        return {"steps": steps, "guidance": guidance, "seed": list(range(first, first + count))}

    def _finds(self, drawn: Sequence[Image.Image], gallery: Pictures) -> NDArray[np.bool_]:
        nearest = (self.judge(drawn) @ gallery.features.T).argmax(1)
        return np.asarray(nearest == np.arange(len(drawn)))

    def floor_of_the_vae(self, name: str, found: Pictures) -> None:
        """The same of what the VAE alone makes of the pictures: no reconstruction can be better."""
        decoder, gallery, found = self.pipe.decoder, found, found.head(self.settings.drawn)
        pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in found.images])
        levels = (decoder.decode(decoder.encode(pixels)) * 255).round().byte()
        drawn = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in levels]
        self.note(f"{name}: VAE finds the original", self._finds(drawn, gallery))
        self.note(f"{name}: PSNR of the VAE", _psnr(drawn, found.images), "dB")

    def blends(self, name: str, found: Pictures) -> None:
        """Whether both parents of a blend are among the nearest pictures of the set."""
        settings, rng = self.settings, random.Random(self.settings.seed)
        pairs = [rng.sample(range(len(found.images)), 2) for _ in range(settings.blends)]
        zs = [self.pipe.mix(list(found.z[[a, b]]), mode="average") for a, b in pairs]
        mixed = torch.stack(zs)
        drawn = self.pipe.reconstruct(z=mixed, **self.drawing(len(mixed)))
        order = np.argsort(-(self.judge(drawn) @ found.features.T), axis=1)[:, :NEAREST]
        both = [{a, b} <= set(row) for (a, b), row in zip(pairs, order.tolist(), strict=True)]
        one = [bool({a, b} & set(row)) for (a, b), row in zip(pairs, order.tolist(), strict=True)]
        self.note(f"{name}: blend has both parents among the ten nearest", both)
        self.note(f"{name}: blend has one parent at least among them", one)
        styles = [{found.styles[a], found.styles[b]} for a, b in pairs]
        self.show(f"{name}-first", [found.images[a] for a, _ in pairs], styles)
        self.show(f"{name}-second", [found.images[b] for _, b in pairs], styles)
        self.show(f"{name}-blend", drawn, styles)


def _some(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    if len(records) <= count:
        return list(records)
    return random.Random(seed).sample(list(records), count)


def _equal(said: Sequence[str], labels: Sequence[str]) -> list[bool]:
    return [a == b for a, b in zip(said, labels, strict=True)]


def _psnr(drawn: Sequence[Image.Image], originals: Sequence[Image.Image]) -> list[float]:
    pairs = zip(drawn, originals, strict=True)
    errors = [
        np.square((np.asarray(a, float) - np.asarray(b, float)) / 255).mean() for a, b in pairs
    ]
    return [float(-10 * np.log10(max(error, 1e-10))) for error in errors]


def measure(model: Path, root: Path, samples: str, split: str, settings: Settings) -> Bench:
    """All figures of a split, `val` for tuning or `test`."""
    bench = Bench(model, root, samples, settings)
    sets = ["style", "concepts", *(["both"] if split == "test" else [])]
    found = {name: bench.read(f"{split}-{name}") for name in sets}
    for name in sets:
        bench.names(name, found[name])
    steps: list[Callable[[str, Pictures], None]] = [bench.floor_of_the_vae, bench.reconstructions]
    for step in steps:
        for name in ("concepts", "style"):
            step(name, found[name])
    bench.blends("concepts", found["concepts"])
    return bench


def trainings(folder: Path) -> dict[str, Json]:
    """Steps and minutes of every run in a folder, from its log; a run that went on after an interruption counts all of it."""
    found: dict[str, Json] = {}
    for log in sorted(folder.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        last = next((row for row in reversed(rows) if row.get("kind") == "train"), None)
        if last is not None:
            minutes = round(last["elapsed_seconds"] / 60, 1)
            found[log.parent.name] = {"steps": last["step"], "minutes": minutes}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="the folder that stage 2 saved")
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of packages, pictures and backbone"
    )
    parser.add_argument("--samples", required=True, help="the pictures that both stages have seen")
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--sheets", type=Path, help="folder for the pictures that were drawn")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = parser.parse_args(argv)
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    try:
        bench = measure(given.model, given.root, given.samples, given.split, settings)
        about = {"split": given.split, **asdict(settings)}
        figures = {"settings": about, "figures": bench.figures, "captions": bench.captions}
        write_json(given.json, figures | {"runs": trainings(given.root / "runs")})
        if given.sheets is not None:
            given.sheets.mkdir(parents=True, exist_ok=True)
            for name, images in bench.shown.items():
                if images:
                    _strip(images).save(given.sheets / f"{name}.png")
    except VLVError as error:
        say(f"measure: {error}")
        return 1
    say(f"{len(bench.figures)} figures -> {given.json}")
    return 0


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, without a gap."""
    side = images[0].width
    strip = Image.new("RGB", (side * len(images), side))
    for number, image in enumerate(images):
        strip.paste(image, (side * number, 0))
    return strip


if __name__ == "__main__":
    sys.exit(main())
