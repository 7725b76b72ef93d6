from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlv.config import PartSource
from vlv.errors import ConfigError, ModelFolderError
from vlv.models import gguf_files
from vlv.models.gguf_files import converted, unpacked

WIDTH, LAYERS, HEADS, FEED = 32, 2, 2, 64
WORDS = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "fo", "fox"]

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the extra gguf is not installed"
)


def write_llama(path: Path, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A GGUF file of a very small llama with a BPE of letters; returns its weights."""
    import gguf

    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = {f"attn_{x}.weight": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
        block |= {"attn_norm.weight": (WIDTH,), "ffn_norm.weight": (WIDTH,)}
        block |= {"ffn_gate.weight": (FEED, WIDTH), "ffn_up.weight": (FEED, WIDTH)}
        block |= {"ffn_down.weight": (WIDTH, FEED)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, *[1] * (len(WORDS) - 1)])
    writer.add_token_merges(["f o", "fo x"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@needs_gguf
def test_a_file_becomes_a_folder_that_loads_as_any_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(gguf_files, "gguf_cache", lambda: tmp_path / "cache")
    tensors = write_llama(tmp_path / "small.gguf")
    source = unpacked(PartSource(path=str(tmp_path / "small.gguf")))
    model = AutoModelForCausalLM.from_pretrained(source.path)
    assert model.dtype == torch.float16
    table = model.get_input_embeddings().weight.detach().float().numpy()
    assert np.array_equal(table, tensors["token_embd.weight"].astype(np.float16).astype(np.float32))
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    assert tokenizer.decode(tokenizer("fox", add_special_tokens=False).input_ids) == "fox"
    assert tokenizer.eos_token_id == 0


@needs_gguf
def test_it_is_converted_once_and_anew_where_the_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = tmp_path / "small.gguf", tmp_path / "cache"
    write_llama(file)
    first = converted(file, cache)
    with monkeypatch.context() as context:
        context.setattr(gguf_files, "_convert", lambda *_: pytest.fail("it was converted again"))
        assert converted(file, cache) == first
    write_llama(file, seed=1)
    assert converted(file, cache) != first


@needs_gguf
def test_stage_2_starts_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import tiny
    from vlv.config import load_config
    from vlv.training.assemble import load_caption_decoder

    monkeypatch.setattr(gguf_files, "gguf_cache", lambda: tmp_path / "cache")
    write_llama(tmp_path / "small.gguf")
    config = load_config(
        "paper-stage2", ["data.inputs=[nowhere]", f"model.llm={tmp_path / 'small.gguf'}"]
    )
    decoder = load_caption_decoder(config, tiny.make_decoder())
    c = torch.zeros(1, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    assert decoder.loss(c, ["fox"]).isfinite()
    assert next(decoder.parameters()).dtype == torch.float32


def test_a_folder_stays_what_it_is(tmp_path: Path) -> None:
    source = PartSource(path=str(tmp_path), subfolder="llm")
    assert unpacked(source) is source


def test_what_cannot_be_read_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelFolderError, match=r"none\.gguf cannot be read \(No such file"):
        converted(tmp_path / "none.gguf", tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK and so on")
    with pytest.raises(ModelFolderError, match="is no GGUF file"):
        converted(other, tmp_path)
    other.write_bytes(b"GGUF and then nothing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "vlv\[gguf\]"'):
        converted(other, tmp_path)


@needs_gguf
def test_a_damaged_file_is_said_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    write_llama(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelFolderError, match=r"the part llm in .* cannot be loaded"):
        converted(file, tmp_path / "cache")
    assert not any((tmp_path / "cache").glob("*"))
