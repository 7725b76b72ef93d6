"""Low-rank adapters of a language model."""

from __future__ import annotations

import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("peft", reason='adapters need the package peft: pip install "vlv[lora]"')

from tests import tiny
from vlv.config import LoraConfig
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.lora import (
    CONFIG_NAME,
    add_low_rank,
    let_train,
    low_rank_parameters,
    merge_low_rank,
    read_settings,
    save_low_rank,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def with_adapters(seed: int = 0, **settings: Any) -> PreTrainedModel:
    llm = tiny.make_llm()
    add_low_rank(llm, LoraConfig(**settings), seed)
    return llm


def logits(llm: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = llm(torch.arange(1, 9)[None]).logits
        return found


def test_fresh_adapters_change_nothing_and_train_alone() -> None:
    before = torch.get_rng_state()
    llm = with_adapters(rank=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits(llm), logits(tiny.make_llm()))
    let_train(llm, True)
    trained = {name: p.shape for name, p in llm.named_parameters() if p.requires_grad}
    assert trained == {name: p.shape for name, p in low_rank_parameters(llm).items()}
    assert len(trained) == 2 * 2 * 7, "two matrices in each of seven linear layers of two blocks"
    let_train(llm, False)
    assert not any(p.requires_grad for p in llm.parameters())
    plain = tiny.make_llm()
    let_train(plain, True)
    assert all(p.requires_grad for p in plain.parameters())


def test_the_seed_draws_them_and_they_are_added_once() -> None:
    first, same, other = (low_rank_parameters(with_adapters(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    llm = with_adapters(rank=2)
    add_low_rank(llm, LoraConfig(rank=5), 0)
    assert low_rank_parameters(llm).keys() == first.keys()
    assert min(next(iter(low_rank_parameters(llm).values())).shape) == 2


def test_targets_are_chosen_by_name() -> None:
    names = low_rank_parameters(with_adapters(targets=["q_proj", "v_proj"]))
    assert {name.split(".")[4] for name in names} == {"q_proj", "v_proj"}
    with pytest.raises(
        ConfigError, match=r"names 'query', which .* Qwen2ForCausalLM; it has down_"
    ):
        with_adapters(targets=["q_proj", "query"])
    with pytest.raises(ConfigError, match="names 'lm_head'"):
        with_adapters(targets=["lm_head"])


def test_peft_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'adapters need peft .*pip install "vlv\[lora\]"'):
        with_adapters()


def learnt(llm: PreTrainedModel) -> PreTrainedModel:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in low_rank_parameters(llm).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return llm


def test_peft_reads_what_is_written_and_merging_changes_nothing(tmp_path: Path) -> None:
    from peft import PeftModel

    llm = learnt(with_adapters(rank=3, alpha=5))
    save_low_rank(llm, tmp_path, "a-model")
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["base_model_name_or_path"] == "a-model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what is deprecated
        foreign = PeftModel.from_pretrained(tiny.make_llm(), str(tmp_path))
    assert torch.equal(logits(foreign), logits(llm))
    merged = tiny.make_llm()
    merge_low_rank(merged, tmp_path)
    assert not torch.allclose(logits(tiny.make_llm()), logits(llm), atol=0.1)
    torch.testing.assert_close(logits(merged), logits(llm), atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == tiny.make_llm().state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is read"),
        ({"use_dora": True}, "sets use_dora to True, which is not read"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
        ({"megatron_core": "os"}, "sets megatron_core to 'os'"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"r": 10**9}, "r, lora_alpha and target_modules are 1000000000"),
        ({"r": True}, "but a number up to 1024"),
        ({"lora_alpha": 0}, "but a number up to 1024"),
        ({"target_modules": ".*"}, "names of layers are wanted"),
        ({"target_modules": []}, "names of layers are wanted"),
        ({"auto_map": {"x": "y"}}, "names code"),
    ],
)
def test_a_strangers_settings(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(usual))
    assert read_settings(path).rank == 4
    path.write_text(json.dumps(usual | changes))
    with pytest.raises(ModelFolderError) as refused:
        read_settings(path)
    assert told in str(refused.value)
