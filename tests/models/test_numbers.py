"""Numbers and embeddings that make no sense: one sentence, from every public method and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.conftest import write_image
from vlv import VLVPipeline
from vlv.cli import run
from vlv.errors import VLVError
from vlv.models.calibration import read_calibration
from vlv.models.decoding import Generation
from vlv.models.folder import shipped_models
from vlv.models.verification import Verification

NAN, INF = float("nan"), float("inf")
EMBEDDINGS: dict[str, Any] = {
    "1-d": torch.zeros(32),
    "4-d": torch.zeros(1, 1, 8, 32),
    "empty": torch.zeros(0, 8, 32),
    "no rows": torch.zeros(8, 0),
    "empty list": [],
    "ragged": [[1.0, 2.0], [3.0]],
    "complex": torch.zeros(8, 32, dtype=torch.complex64),
    "complex array": np.zeros((8, 32), np.complex64),
    "nan": torch.full((8, 32), NAN),
    "inf": np.full((8, 32), INF),
    "too large": np.full((8, 32), 1e300),
    "objects": np.array([[object()]]),
    "words": [["a", "b"]],
    "a word": "z",
    "a number": 5,
    "another width": torch.zeros(8, 33),
    "too many": torch.zeros(99, 32),
    "a mapping": {"z": 1},
}
DRAWING: list[dict[str, Any]] = [
    *({"steps": value} for value in (0, -1, 1.5, 10**9, NAN, "2", None, True)),
    *({"guidance": value} for value in (NAN, INF, -INF, "2", None, 1j, [1.0])),
    *({"seed": value} for value in (-1, 1.5, "a", None, [0.5], NAN, 2**65)),
    *({"batch_size": value} for value in (0, -1, 1.5, None)),
    {"sampler": "euler"},
    {"sampler": 5},
]
GENERATION: list[dict[str, Any]] = [
    *({"top_p": value, "do_sample": True} for value in (NAN, INF, 0, -1, 2, "x", None)),
    *({"temperature": value, "do_sample": True} for value in (NAN, INF, 0, -1, "x", None)),
    *({"repetition_penalty": value} for value in (NAN, INF, 0, -1, None)),
    *({"num_beams": value} for value in (0, -1, 1.5, NAN, "x", None)),
    *({"max_new_tokens": value} for value in (0, -1, 1.5, NAN, "x", 10**12)),
    *({"seed": value} for value in (-1, 1.5, NAN, None)),
    *({"batch_size": value} for value in (0, -1, 1.5, None)),
    {"end_token": 5},
    *({name: value} for name in ("do_sample", "early_stopping", "tidy") for value in ("x", NAN, 1)),
    {"num_beams": 10**9},
]
SCORING: list[dict[str, Any]] = [
    *({"timesteps": value} for value in (0, -1, 1.5, NAN, None, "x", True, 10**9)),
    *({"lowest": value} for value in (NAN, -0.1, 1, 2, INF, "x", None)),
    *({"highest": value} for value in (NAN, -0.1, 0.1, 1, INF, "x", None)),
    *({"seed": value} for value in (-1, 1.5, NAN, None, 2**65)),
    *({"batch_size": value} for value in (0, -1, 1.5, None)),
]
CAPTIONS: list[Any] = [
    None,
    5,
    NAN,
    "",
    " ",
    [],
    [None],
    [5],
    [b"a"],
    {"a": 1},
    ["a", "b", "c"],
    [[]],
    [["a"], []],
    object(),
]
VERIFY: list[Any] = [0, 1, -1, 2.5, NAN, "8", True, [2], 10**9]
MIXES: list[dict[str, Any]] = [
    *(
        {"weights": value, "mode": "average"}
        for value in ([NAN, 1], [INF, 1], [-1, 1], [0, 0], [1], ["a", 1], [1j, 1], [None, 1], 5)
    ),
    *({"weights": value, "mode": "slerp"} for value in ([NAN, 1], [INF, INF], [1e308, 1e308])),
    *({"keep": value} for value in ([1.5, 2], [NAN, 1], ["a", 1], [-1, 1], [10**12, 1], [0, 0], 5)),
    {"mode": "sum"},
    {"mode": 5},
]


def assert_refused(call: Any, about: object) -> None:
    with pytest.raises(VLVError) as caught:
        call()
    text = str(caught.value)
    assert text, about
    assert "\n" not in text, about
    assert len(text) < 400, about


@pytest.mark.parametrize("method", ["caption", "describe", "reconstruct", "context", "read_tokens"])
def test_an_embedding_that_is_none_is_refused(tiny_pipeline: VLVPipeline, method: str) -> None:
    for name, z in EMBEDDINGS.items():
        assert_refused(lambda z=z: getattr(tiny_pipeline, method)(z=z), name)


def test_a_mix_of_what_is_no_embedding_is_refused(tiny_pipeline: VLVPipeline) -> None:
    good = torch.zeros(8, 32)
    for name, z in EMBEDDINGS.items():
        if name not in ("another width", "too many"):
            assert_refused(lambda z=z: tiny_pipeline.mix([good, z]), name)
    assert_refused(lambda: tiny_pipeline.mix([good, torch.zeros(8, 33)]), "another width")
    for items in ([], [good], 5, None):
        assert_refused(lambda items=items: tiny_pipeline.mix(items), items)


def test_embeddings_of_any_kind_are_taken(tiny_pipeline: VLVPipeline) -> None:
    z = tiny_pipeline.embed(torch.zeros(2, 3, 32, 32))
    for same in (z.numpy(), z.tolist(), list(z), tuple(z), z.double().numpy(), z.half().float()):
        assert len(tiny_pipeline.caption(z=same, max_new_tokens=2)) == 2
    assert isinstance(tiny_pipeline.caption(z=z[0].tolist(), max_new_tokens=2), str)
    assert tiny_pipeline.mix([z[0].numpy(), z[1].tolist()], mode="average").shape == (8, 32)


@pytest.mark.parametrize("method", ["reconstruct", "generate", "draw"])
def test_sampling_settings_that_make_no_sense_are_refused(
    tiny_pipeline: VLVPipeline, method: str
) -> None:
    z = torch.zeros(1, 8, 32)
    given = {"reconstruct": {"z": z}, "generate": {"texts": "a"}, "draw": {"c": tiny_pipeline.context(z)}}  # fmt: skip
    for settings in DRAWING:
        settings = {"steps": 1} | settings
        assert_refused(lambda s=settings: getattr(tiny_pipeline, method)(**given[method], **s), settings)  # fmt: skip


@pytest.mark.parametrize("method", ["caption", "describe"])
def test_decoding_settings_that_make_no_sense_are_refused(
    tiny_pipeline: VLVPipeline, method: str
) -> None:
    for settings in GENERATION:
        settings = {"max_new_tokens": 2} | settings
        call = lambda s=settings: getattr(tiny_pipeline, method)(z=torch.zeros(8, 32), **s)  # noqa: E731
        assert_refused(call, settings)


@pytest.mark.parametrize("method", ["score", "weigh", "verify"])
def test_judging_settings_and_captions_that_make_no_sense_are_refused(
    tiny_pipeline: VLVPipeline, method: str
) -> None:
    image, judge = torch.zeros(3, 32, 32), getattr(tiny_pipeline, method)
    known = (
        {"calibration": read_calibration(shipped_models()["vlv-tiny"])}
        if method == "verify"
        else {}
    )
    for settings in SCORING:
        assert_refused(lambda s=settings: judge(image, "A cube.", **known, **s), settings)
    for captions in CAPTIONS:
        if not (method == "score" and captions == ["a", "b", "c"]):
            assert_refused(lambda c=captions: judge(image, c, **known), captions)
        assert_refused(lambda c=captions: judge([image, image], c, **known), captions)
    for strange in (image + NAN, torch.zeros(32), [], None):
        assert_refused(lambda s=strange: judge(s, "A cube.", **known), strange)
    if method == "verify":
        for calibration in (None, 5, {"scale": 1}, NAN):
            assert_refused(
                lambda c=calibration: judge(image, "A cube.", calibration=c), calibration
            )


def test_verification_that_makes_no_sense_is_refused(tiny_pipeline: VLVPipeline) -> None:
    for verify in VERIFY:
        assert_refused(
            lambda v=verify: tiny_pipeline.caption(torch.zeros(3, 32, 32), verify=v), verify
        )
    for field, values in {
        "temperature": (0, -1, NAN, INF, "x", None),
        "enough": (NAN, INF, "x"),
    }.items():
        for value in values:
            assert_refused(lambda f=field, v=value: Verification(**{f: v}), (field, value))
    captions = tiny_pipeline.describe(
        [torch.zeros(3, 32, 32)], verify=np.int64(2), seed=np.int64(3), max_new_tokens=2
    )
    assert captions[0].check is not None


def test_copies_that_make_no_sense_are_refused(tiny_pipeline: VLVPipeline) -> None:
    captioner, c = (
        tiny_pipeline.caption_decoder,
        tiny_pipeline.context(torch.zeros(1, 8, 32)).sequence,
    )
    how = Generation(max_new_tokens=2)
    for copies in (0, -1, 1.5, NAN, None, "2", True):
        assert_refused(lambda n=copies: captioner.write(c, how, copies=n), copies)


def test_mixing_settings_that_make_no_sense_are_refused(tiny_pipeline: VLVPipeline) -> None:
    zs = [torch.ones(8, 32), torch.arange(256.0).view(8, 32)]
    for settings in MIXES:
        assert_refused(lambda s=settings: tiny_pipeline.mix(zs, **s), settings)


@pytest.mark.parametrize("method", ["embed", "caption", "reconstruct"])
def test_images_of_strange_numbers_are_refused(tiny_pipeline: VLVPipeline, method: str) -> None:
    pixels = torch.zeros(3, 32, 32)
    strange: dict[str, Any] = {
        "nan": pixels + NAN,
        "inf": pixels + INF,
        "complex": pixels.to(torch.complex64),
        "empty": torch.zeros(3, 0, 32),
        "two channels": torch.zeros(2, 32, 32),
        "1-d": torch.zeros(32),
        "array of objects": np.full((32, 32, 3), None),
        "array of NaN": np.full((32, 32, 3), NAN),
        "out of range": pixels + 7,
        "nothing": [],
    }
    for name, image in strange.items():
        assert_refused(lambda image=image: getattr(tiny_pipeline, method)(image), name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("caption", "--temperature", "nan"),
        ("caption", "--temperature", "-1"),
        ("caption", "--top-p", "2"),
        ("caption", "--top-p", "nan"),
        ("caption", "--num-beams", "0"),
        ("caption", "--max-new-tokens", "0"),
        ("caption", "--max-words", "0"),
        ("caption", "--batch-size", "0"),
        ("caption", "--batch-size", "nan"),
        ("caption", "--seed", "-1"),
        ("caption", "--limit", "0"),
        ("reconstruct", "--guidance", "nan"),
        ("reconstruct", "--guidance", "inf"),
        ("reconstruct", "--steps", "1.5"),
        ("reconstruct", "--steps", "99999999"),
        ("reconstruct", "--seed", "99999999999999999999999"),
        ("mix", "--weight", "nan", "--weight", "1", "--mode", "slerp"),
        ("mix", "--weight", "inf", "--weight", "1", "--mode", "average"),
        ("mix", "--keep", "1.5", "--keep", "1"),
        ("mix", "--guidance", "nan"),
        ("embed", "--batch-size", "0"),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_one_sentence(
    arguments: tuple[str, ...],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, *options = arguments
    images = [str(write_image(tmp_path / f"{name}.png")) for name in "ab"]
    output = tmp_path / {"mix": "m.png", "embed": "z.safetensors", "caption": "c.jsonl"}.get(command, "out")  # fmt: skip
    assert run([command, *images, "-o", str(output), "--model", str(tiny_folder), *options]) == 1
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1].startswith("vlv: ")
    assert "Traceback" not in said.err
