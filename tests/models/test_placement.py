"""Device, dtype, offloading, slices and fewer bits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from tests import tiny
from vlv.errors import ConfigError
from vlv.models import placement as placements
from vlv.models.folder import shipped_models
from vlv.models.pipeline import VLVPipeline
from vlv.models.placement import Placement, pick_device, pick_dtype, place

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("vlv-tiny" not in shipped_models(), reason="the model is not shipped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "package"), [(8, "torchao"), (4, "bitsandbytes")])
def test_fewer_bits_write_much_the_same(bits: Any, package: str, dtype: torch.dtype) -> None:
    pytest.importorskip(package)
    pipe = VLVPipeline.from_pretrained("vlv-tiny", parts=["caption"], dtype=dtype)
    llm, image = pipe.caption_decoder.llm, torch.full((3, 64, 64), 0.5)
    plain = pipe.caption(image, max_new_tokens=8)
    tokens = pipe.caption_decoder.tokenizer(plain, return_tensors="pt").input_ids
    before = llm(tokens).logits.float()
    place(pipe, Placement(device="cpu", llm_bits=bits))
    after = llm(tokens).logits.float()
    error = (after - before).pow(2).mean().sqrt() / before.std()
    assert 0 < error < (0.05 if bits == 8 else 0.3)
    assert pipe.caption(image, max_new_tokens=8).split()[0] == plain.split()[0]
    assert llm.get_input_embeddings().weight.dtype == dtype
