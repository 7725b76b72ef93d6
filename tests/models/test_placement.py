"""Device, dtype, offloading, slices and fewer bits."""

from __future__ import annotations

import importlib
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from PIL import Image

from tests import tiny
from vlv.errors import ConfigError
from vlv.models import placement as placements
from vlv.models.folder import shipped_models
from vlv.models.pipeline import VLVPipeline
from vlv.models.placement import Placement, pick_device, pick_dtype, place
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "dtype"),
    [
        (True, False, "cuda", torch.bfloat16),
        (False, True, "mps", torch.bfloat16),
        (False, False, "cpu", torch.float32),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, device: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(placements, "_mps_has_bfloat16", lambda: True)
    assert pick_device("auto") == device
    assert pick_dtype("auto", device) == dtype


def test_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert pick_dtype("auto", "cuda:1") == torch.float16
    monkeypatch.setattr(placements, "_mps_has_bfloat16", lambda: False)
    assert pick_dtype("auto", "mps") == torch.float32
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16


def test_wrong_choices(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int3'; choose auto or one of float32"):
        pick_dtype("int3", "cpu")
    with pytest.raises(ConfigError, match=r"device 'gpu' cannot be used .* try --device cpu"):
        pick_device("gpu")
    pipe = VLVPipeline.from_pretrained(tiny_folder, parts=["embed"])
    with pytest.raises(ConfigError, match="--offload frees a GPU"):
        place(pipe, Placement(device="cpu", offload=True))


def test_offloading_brings_each_part_only_while_it_works(
    tiny_folder: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder)
    images, plain = list(pixels), pipe.caption(list(pixels), max_new_tokens=3)
    monkeypatch.setattr(placements, "pick_device", lambda _: "elsewhere:0")
    monkeypatch.setattr(torch, "device", lambda name: name)
    there: set[str] = set()
    trips: list[tuple[str, frozenset[str]]] = []
    for name in ("encoder", "text_encoder", "unet", "vae", "caption_decoder"):

        def to(device: Any, name: str = name) -> None:
            (there.discard if device == "cpu" else there.add)(name)
            trips.append((str(device), frozenset(there)))

        monkeypatch.setattr(getattr(pipe, name), "to", to)
    place(pipe, Placement(offload=True))
    assert pipe.caption(images, max_new_tokens=3) == plain
    assert {"caption_decoder"} in [set(parts) for _, parts in trips]
    assert max(len(parts) for _, parts in trips) == 1
    assert not there
    trips.clear()
    pipe.reconstruct(images[0], steps=1)
    pipe.generate("A red cube.", steps=1)
    assert max(len(parts) for _, parts in trips) == 3
    assert not there


@pytest.mark.parametrize("mode", ["sliced", "tiled"])
def test_the_vae_in_pieces(
    tiny_folder: Path, pixels: torch.Tensor, mode: Literal["sliced", "tiled"]
) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, parts=["reconstruct"])
    whole = pipe.decoder.decode(torch.ones(3, *tiny.LATENT_SHAPE))
    place(pipe, Placement(device="cpu", vae=mode))
    assert pipe.vae.use_slicing
    assert pipe.vae.use_tiling == (mode == "tiled")
    torch.testing.assert_close(
        pipe.decoder.decode(torch.ones(3, *tiny.LATENT_SHAPE)), whole, atol=1e-5, rtol=0
    )


# --- compiling and layouts -------------------------------------------------------------------------


@pytest.mark.slow
def test_what_gains_most_is_compiled_and_gives_the_same(
    tiny_folder: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder)
    image = pixels[0]
    before = pipe.caption(image, max_new_tokens=3), pipe.reconstruct(image, steps=2)
    compiled, compile_module = [], torch.nn.Module.compile

    def without_translation(module: torch.nn.Module) -> None:
        compiled.append(module)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_translation)
    monkeypatch.setattr(placements, "why_no_compiler", lambda _: "")
    place(pipe, Placement(device="cpu", compile=True))
    assert compiled == [*pipe.encoder.vision()[:1], pipe.unet, pipe.vae.decoder]
    assert pipe.caption(image, max_new_tokens=3) == before[0]
    assert pipe.reconstruct(image, steps=2) == before[1]


def test_compiling_without_a_compiler_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, parts=["embed"])
    monkeypatch.setattr(placements, "why_no_compiler", lambda _: "no C++ compiler was found")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler was found; leave --compile out"):
        place(pipe, Placement(device="cpu", compile=True))


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda", True)])
def test_convolutions_of_a_gpu_have_channels_last(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, expected: bool
) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, parts=["reconstruct"])
    monkeypatch.setattr(placements, "pick_device", lambda name: name)
    monkeypatch.setattr(VLVPipeline, "to", lambda *_: None)
    place(pipe, Placement(device=device))
    for layer in (pipe.unet.conv_in, pipe.vae.decoder.conv_in):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) is expected


# --- fewer bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "package"), [(8, "torchao"), (4, "bitsandbytes")])
def test_a_missing_package(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, bits: Any, package: str
) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, parts=["caption"])

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=rf"{bits}-bit weights need {package} .*vlv\[quant\]"):
        place(pipe, Placement(device="cpu", llm_bits=bits))


@pytest.fixture(scope="module")
def written() -> dict[torch.dtype, Any]:
    """Caption embeddings of eight scenes in either dtype, and what the shipped model writes of them."""
    images = [Image.fromarray(render(sample_scene(1, n, "test")).image) for n in range(8)]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = VLVPipeline.from_pretrained("vlv-tiny", parts=["caption"], dtype=dtype)
        z = pipe.embed(images)
        found[dtype] = z, pipe.caption(z=z)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("vlv-tiny" not in shipped_models(), reason="the model is not shipped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "package"), [(8, "torchao"), (4, "bitsandbytes")])
def test_fewer_bits_write_much_the_same_in_less_memory(
    bits: Any, package: str, dtype: torch.dtype, written: dict[torch.dtype, Any]
) -> None:
    """Of the shipped model's captions 8 bits leave most to the letter; 4 bits, and bfloat16, change a few words."""
    pytest.importorskip(package)
    z, plain = written[dtype]
    pipe = VLVPipeline.from_pretrained("vlv-tiny", parts=["caption"], dtype=dtype)
    llm = pipe.caption_decoder.llm
    large = _weight_bytes(llm)
    tokens = pipe.caption_decoder.tokenizer(plain[0], return_tensors="pt").input_ids
    before = llm(tokens).logits.float()
    place(pipe, Placement(device="cpu", llm_bits=bits))
    after = llm(tokens).logits.float()
    error = (after - before).pow(2).mean().sqrt() / before.std()
    assert 0 < error < (0.05 if bits == 8 else 0.3)
    fewer = pipe.caption(z=z)
    assert sum(map(_agreement, plain, fewer)) / len(z) > (0.93 if bits == 8 else 0.85)
    if bits == 8 and dtype == torch.float32:
        assert sum(one == other for one, other in zip(plain, fewer, strict=True)) >= 6
    # what is left of each layer: its numbers, and 8 bits a scale of each row, 4 bits one of each block
    share = bits / (8 * dtype.itemsize)
    assert _weight_bytes(llm) < 1.1 * share * large
    assert llm.get_input_embeddings().weight.dtype == dtype


def _agreement(one: str, other: str) -> float:
    """Share of the words that two captions have in common, in their order."""
    return SequenceMatcher(None, one.split(), other.split()).ratio()


def _weight_bytes(llm: Any) -> int:
    """Bytes of the numbers in the linear layers, the output layer excepted, with the scales of quantised ones."""
    head, total = llm.get_output_embeddings(), 0
    for layer in llm.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            weight: Any = layer.weight
            state = getattr(weight, "quant_state", None)
            parts = [weight, *(state.as_dict(packed=True).values() if state else ())]
            if hasattr(weight, "qdata"):  # torchao
                parts = [weight.qdata, weight.scale]
            total += sum(part.numel() * part.itemsize for part in parts)
    return total
