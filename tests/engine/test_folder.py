"""The language model as a folder of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from vlv.engine import saved_language_model
from vlv.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.models.captioner import CaptionDecoder


@pytest.mark.parametrize("untied", [False, True])
def test_it_is_a_plain_model_that_reads_prefixes_as_ours_does(
    decoder: CaptionDecoder, c: torch.Tensor, untied: bool
) -> None:
    folder = saved_language_model(decoder, untied=untied)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shared = llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    assert shared is not untied
    with torch.no_grad():
        prefix = decoder.prefix(c)
        assert torch.equal(
            llm(inputs_embeds=prefix).logits, decoder.llm(inputs_embeds=prefix).logits
        )
    assert len(AutoTokenizer.from_pretrained(folder)) == len(decoder.tokenizer)
    assert not (folder / "generation_config.json").exists()


def test_it_is_written_once_under_a_name_that_tells_the_weights(
    decoder: CaptionDecoder, folder: Path
) -> None:
    written = (folder / "config.json").stat().st_mtime_ns
    assert saved_language_model(decoder) == folder
    assert saved_language_model(tiny.make_caption_decoder(seed=9)) == folder  # another projector
    assert (folder / "config.json").stat().st_mtime_ns == written
    other = tiny.make_caption_decoder()
    with torch.no_grad():
        other.llm.get_input_embeddings().weight[0, 0] += 1
    assert saved_language_model(other) != folder
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_weights_of_fewer_bits_and_a_full_disk_are_one_sentence(
    decoder: CaptionDecoder, cache: Path
) -> None:
    cache.write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        saved_language_model(decoder)
    packed = tiny.make_caption_decoder()
    layer = packed.llm.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="plain weights; leave --llm-bits out"):
        saved_language_model(packed)
