"""`vlv reconstruct`, `vlv generate`, `vlv mix`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Vlv
from tests.tiny import IMAGE_SIZE
from vlv.jobs.pictures import read_settings
from vlv.models.pipeline import VLVPipeline

QUICK = ("--steps", 2)


@pytest.fixture
def args(tiny_folder: Path, photos: Path) -> tuple[object, ...]:
    return ("reconstruct", photos, "--model", tiny_folder, *QUICK)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_reconstruct(vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = vlv(*args, "-o", folder, "--seed", 4, "--sheet")
    assert result.code == 0
    assert list(contents(folder)) == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "more/4.png",
        "sheet-000.png",
    ]
    assert result.out.strip() == str(folder / "sheet-000.png")
    settings = read_settings(folder / "more" / "4.png")
    assert settings is not None
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (4, 2, 2.0)
    assert settings["source"] == str(photos / "more" / "4.jpg")
    with Image.open(folder / "0.png") as image:
        assert (image.size, image.mode) == ((IMAGE_SIZE, IMAGE_SIZE), "RGB")


@pytest.mark.slow
def test_seed_decides_and_batches_do_not(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path
) -> None:
    vlv(*args, "-o", tmp_path / "a", "--batch-size", 1)
    vlv(*args, "-o", tmp_path / "b", "--batch-size", 4)
    vlv(*args, "-o", tmp_path / "c", "--seed", 1)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    for name in a:
        with Image.open(tmp_path / "a" / name) as one, Image.open(tmp_path / "b" / name) as two:
            worst = max(abs(x - y) for x, y in zip(one.tobytes(), two.tobytes(), strict=True))
        assert worst <= 1, "rounding only"
    assert all(a[name] != c[name] for name in a)
    assert list(a) == list(b)


@pytest.mark.slow
def test_resume_after_an_interruption(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    draw, calls = VLVPipeline.draw, iter([False, True])

    def interrupted(self: VLVPipeline, *rest: object, **options: object) -> object:
        if next(calls):
            raise KeyboardInterrupt
        return draw(self, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(VLVPipeline, "draw", interrupted)
        assert vlv(*args, "-o", folder, "--batch-size", 2).code == 130
    assert list(contents(folder)) == ["0.png", "1.png"]
    result = vlv(*args, "-o", folder, "--batch-size", 2)
    assert result.code == 0
    assert "done 3, skipped 2" in result.err
    monkeypatch.setattr(VLVPipeline, "from_pretrained", None)
    assert "done 0, skipped 5" in vlv(*args, "-o", folder).err


@pytest.mark.slow
def test_existing_images_are_kept(
    vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    vlv(*args, "-o", folder)
    before = contents(folder)
    for options in (("--seed", 1), ("--on-existing", "error")):
        result = vlv(*args, "-o", folder, *options)
        assert result.code == 1
        assert contents(folder) == before
    assert vlv(*args, "-o", folder, "--seed", 1, "--on-existing", "overwrite").code == 0
    assert contents(folder) != before
    result = vlv(*args, "-o", photos, "--on-existing", "overwrite")
    assert result.code == 1
    assert "is an input and would be overwritten" in result.err


def test_output_that_is_a_file(vlv: Vlv, args: tuple[object, ...], photos: Path) -> None:
    result = vlv(*args, "-o", photos / "0.png")
    assert result.code == 1
    assert "is a file" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "greater than or equal to 1"),
        (("--steps", 5000), "steps is 5000"),
        (("--sampler", "x"), "x"),
    ],
)
def test_wrong_sampling(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = vlv(*args, "-o", tmp_path / "out", *options)
    assert result.code == 1
    assert message in result.err


@pytest.mark.slow
def test_generate(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    args = ("generate", "A red cube", "word " * 40, "-o", tmp_path, "--model", tiny_folder, *QUICK)
    result = vlv(*args)
    assert result.code == 0
    first = tmp_path / "a-red-cube.png"
    assert result.out.splitlines()[0] == str(first)
    assert "1 of 2 texts are longer than the decoder reads" in result.err
    settings = read_settings(first)
    assert settings is not None
    assert settings["text"] == "A red cube"
    before = first.read_bytes()
    assert vlv(*args, "--seed", 1).out.splitlines()[0] == str(tmp_path / "a-red-cube-2.png")
    assert first.read_bytes() == before
    again = vlv(*args)
    assert again.out.splitlines()[0] == str(first), "the same text and settings: it is there"
    assert "done 0, skipped 2" in again.err
    assert len(list(tmp_path.glob("a-red-cube*.png"))) == 2
    refused = vlv(*args, "--on-existing", "error")
    assert (refused.code, "a-red-cube.png exists" in refused.err) == (1, True)
    assert vlv(*args, "--seed", 2, "--on-existing", "overwrite").code == 0
    assert first.read_bytes() != before
    empty = vlv("generate", "  ", "-o", tmp_path, "--model", tiny_folder)
    assert (empty.code, "text number 1 is empty" in empty.err) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [(), ("--keep", "5,3"), ("--weights", ".3,.7"), ("--mode", "slerp"), ("--mode", "average")],
)
def test_mix(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    output = tmp_path / "mix.png"
    inputs = (photos / "0.png", photos / "1.png")
    result = vlv("mix", *inputs, "-o", output, "--model", tiny_folder, *QUICK, *how)
    assert (result.code, result.out.strip()) == (0, str(output))
    settings = read_settings(output)
    assert settings is not None
    assert settings["sources"] == [str(path) for path in inputs]


@pytest.mark.slow
def test_a_negative_changes_the_image_and_is_recorded(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path
) -> None:
    one, two = photos / "0.png", photos / "1.png"
    common = ("--model", tiny_folder, *QUICK)
    drawn = []
    for name, given in (("plain", ()), ("away", ("--negative", two))):
        output = tmp_path / f"{name}.png"
        assert vlv("mix", one, one, "-o", output, *common, *given).code == 0
        settings = read_settings(output)
        assert settings is not None
        assert settings["negative"] == (str(two) if given else None)
        with Image.open(output) as image:
            drawn.append(image.tobytes())
    assert drawn[0] != drawn[1]
    again = vlv("mix", one, one, "-o", tmp_path / "plain.png", *common, "--negative", two)
    assert (again.code, "was not made with these settings" in again.err) == (1, True)
    many = vlv("mix", one, one, "-o", tmp_path / "x.png", *common, "--negative", photos)
    assert (many.code, "name one as negative" in many.err) == (1, True)

    texts = ("generate", "a red cube", "-o", tmp_path / "drawn", *common)
    assert vlv(*texts).code == vlv(*texts, "--negative", "a blue cone").code == 0
    first, second = sorted((tmp_path / "drawn").iterdir())
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.slow
def test_mix_of_one_image_with_itself_is_its_reconstruction(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path
) -> None:
    one = photos / "0.png"
    vlv("reconstruct", one, "-o", tmp_path, "--model", tiny_folder, *QUICK)
    vlv(
        "mix",
        one,
        one,
        "-o",
        tmp_path / "mix.png",
        "--mode",
        "average",
        "--model",
        tiny_folder,
        *QUICK,
    )
    with Image.open(tmp_path / "0.png") as a, Image.open(tmp_path / "mix.png") as b:
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


@pytest.mark.slow
def test_mix_never_overwrites_silently(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mix.png"
    args = ("mix", photos / "0.png", photos / "1.png", "-o", output, "--model", tiny_folder, *QUICK)
    assert vlv(*args).code == 0
    before = output.read_bytes()
    other = vlv(*args, "--seed", 1)
    assert (other.code, "was not made with these settings" in other.err) == (1, True)
    assert vlv(*args, "--on-existing", "error").code == 1
    assert output.read_bytes() == before
    assert vlv(*args, "--seed", 1, "--on-existing", "overwrite").code == 0
    assert output.read_bytes() != before
    monkeypatch.setattr(VLVPipeline, "from_pretrained", None)  # the model is not even loaded
    again = vlv(*args, "--seed", 1)
    assert (again.code, "the same mix is there already" in again.err) == (0, True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (("--keep", "5"), "1 numbers for 2 images"),
        (("--keep", "50,3"), "keep asks for 50 tokens"),
        (("--weights=-1,1",), "non-negative"),
        (("--keep", "5,3", "--mode", "slerp"), "--keep belongs to"),
    ],
)
def test_wrong_mix(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path, how: tuple[str, ...], message: str
) -> None:
    inputs = (photos / "0.png", photos / "1.png")
    result = vlv("mix", *inputs, "-o", tmp_path / "mix.png", "--model", tiny_folder, *how)
    assert result.code == 1
    assert message in result.err
    assert not (tmp_path / "mix.png").exists()


def test_mix_spares_its_inputs(vlv: Vlv, tiny_folder: Path, photos: Path) -> None:
    inputs = (photos / "0.png", photos / "1.png")
    before = inputs[0].read_bytes()
    result = vlv("mix", *inputs, "-o", inputs[0], "--model", tiny_folder, *QUICK)
    assert (result.code, inputs[0].read_bytes() == before) == (1, True)
    result = vlv(
        "mix", inputs[0], photos / "none.png", "-o", photos / "m.png", "--model", tiny_folder
    )
    assert (result.code, "no such file" in result.err) == (1, True)
