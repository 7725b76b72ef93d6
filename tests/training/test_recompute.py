"""Recomputation and arithmetic change what a step costs and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.training.ranks import run_ranks
from tests.training.support import loop_config, optim_config
from tests.training.test_stages import generator, make_batch, stage1, stage2
from vlv.errors import ConfigError
from vlv.models.compilation import repeated_layers
from vlv.training import precision as precision_module
from vlv.training.distributed import World, join_world
from vlv.training.precision import compile_parts, fast_products, store_frozen
from vlv.training.prediction import num_bytes
from vlv.training.recompute import (
    cheapest_that_fits,
    choose_recomputation,
    predicted_peak,
    recompute,
)
from vlv.training.weights import set_train_mode

MAKERS = {
    "stage1": stage1,
    "stage2": lambda: stage2(denoising_weight=0.5),
}
CPU = torch.device("cpu")


def gradients(objective: Any, precision: str = "fp32") -> list[torch.Tensor]:
    """Of every trained parameter, with dropout drawn from one seed; the loss comes first."""
    torch.manual_seed(0)
    objective.module.zero_grad()
    half = precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = objective.loss(make_batch(), generator()).total
    loss.backward()
    found = [p.grad.clone() for p in objective.module.parameters() if p.grad is not None]
    return [loss.detach(), *found]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", MAKERS)
def test_recomputation_changes_neither_loss_nor_gradients(stage: str, precision: str) -> None:
    objective = MAKERS[stage]()  # type: ignore[operator]
    set_train_mode(objective.module)
    modes = [module.training for module in objective.module.modules()]
    expected = gradients(objective, precision)
    for choice in ("unet", "all"):
        recompute(objective, choice)  # type: ignore[arg-type]
        found = gradients(objective, precision)
        assert [module.training for module in objective.module.modules()] == modes
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    recompute(objective, "never")
    assert not any(getattr(m, "gradient_checkpointing", False) for m in objective.module.modules())


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "saver"), [("stage1", "unet"), ("stage2", "all")])
def test_the_least_recomputation_that_fits_is_chosen(
    stage: str, saver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective: Any = stage1() if stage == "stage1" else stage2()
    loop, optim = loop_config(), optim_config(lr_scale={})

    @functools.cache  # what a choice takes is predicted once
    def peak(choice: Any) -> int:
        return predicted_peak(objective, tiny.IMAGE_SIZE, loop, optim, choice)

    def looked_up(*rest: Any, num_ranks: int) -> int:
        assert rest == (objective, tiny.IMAGE_SIZE, loop, optim, rest[-1])
        assert num_ranks == 1
        return peak(rest[-1])

    monkeypatch.setattr("vlv.training.recompute.predicted_peak", looked_up)

    def choose(room: float) -> str:
        return cheapest_that_fits(objective, tiny.IMAGE_SIZE, loop, optim, int(room))

    whole, less = peak("never"), peak(saver)
    assert less < whole
    assert not any(getattr(m, "gradient_checkpointing", False) for m in objective.module.modules())
    assert choose(2 * whole) == "never"
    assert choose(less / 0.92 + 1) == saver
    assert choose(less / 2) == "all"


def test_a_cpu_recomputes_nothing_unless_told_to() -> None:
    objective, optim = stage1(), optim_config(lr_scale={})
    size = tiny.IMAGE_SIZE
    for setting, expected in (("auto", "never"), ("unet", "unet")):
        loop = loop_config(recompute=setting)
        assert choose_recomputation(objective, size, loop, optim, World(0, 1, CPU)) == expected
    assert objective.decoder.unet.is_gradient_checkpointing


SHARDED = loop_config(batch_size=2, parallel="fsdp")


def chosen(rank: int, whole: int) -> list[str]:
    """What a process chooses for FSDP with some of the undivided step's memory free beside its weights."""
    objective, optim = stage2(), optim_config(lr_scale={})
    world = World(rank, 2, torch.device("cuda"), join_world().hosts)
    choices: list[str] = []
    for free in ((1.07, 1.2), (9.0, 0.1)):
        room = int(free[rank] * whole) - num_bytes(objective.module)
        torch.cuda.mem_get_info = lambda _, room=room: (room, room)  # type: ignore[misc]
        choices.append(choose_recomputation(objective, tiny.IMAGE_SIZE, SHARDED, optim, world))
    return choices


@pytest.mark.slow
def test_processes_choose_alike_by_the_least_room_and_count_a_share() -> None:
    """A step of stage 2 whose weights are sharded takes 92 % of an undivided one here, which would not fit."""
    whole = predicted_peak(stage2(), tiny.IMAGE_SIZE, SHARDED, optim_config(lr_scale={}), "never")
    assert run_ranks(2, chosen, whole) == [["never", "all"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_predicted_with_the_attention_of_a_gpu(precision: str) -> None:
    kinds = set()

    class Attention(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "scaled_dot_product" in str(func):
                kinds.update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Attention():
        loop = loop_config(precision=precision)
        predicted_peak(stage2(), tiny.IMAGE_SIZE, loop, optim_config(lr_scale={}), "never")
    half = precision == "bf16"
    assert (torch.bfloat16 in kinds) == half


@pytest.mark.slow
def test_memory_is_predicted_where_the_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 1, torch.device("cuda"))
    monkeypatch.setattr("vlv.training.loop.join_world", lambda: world)
    loop, optim = loop_config(precision="bf16"), optim_config(lr_scale={})
    assert predicted_peak(stage2(), tiny.IMAGE_SIZE, loop, optim, "never") > 1e5


@pytest.mark.parametrize("name", ["unet", "text_encoder", "vision_tower"])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_held_in_bf16_computes_in_it(name: str, frozen: bool) -> None:
    objective = stage1()
    if frozen:
        store_frozen(objective.module, torch.bfloat16, keep=[objective.decoder.vae])
    florence = objective.encoder.backbone.model
    part = florence.vision_tower if name == "vision_tower" else getattr(objective.decoder, name)
    seen = set()
    for module in part.modules():
        module.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    gradients(objective, "bf16")
    assert seen == {not frozen}


def test_tf32_is_set_for_the_time_being() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with fast_products(tf32=not before):
        assert torch.backends.cuda.matmul.allow_tf32 is not before
    assert torch.backends.cuda.matmul.allow_tf32 is before


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "expected"), [("auto", False), (True, True), (False, False)])
def test_channels_last(setting: Any, expected: bool) -> None:
    decoder = tiny.make_decoder()
    compile_parts(loop_config(channels_last=setting), tiny.make_encoder(), decoder, None, CPU)
    weight = decoder.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is expected


def test_nothing_is_compiled_on_a_cpu_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, decoder, compiled = tiny.make_encoder(), tiny.make_decoder(), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    monkeypatch.setattr(precision_module, "why_no_compiler", lambda _: "")
    for setting in ("none", "auto"):
        compile_parts(loop_config(compile=setting), encoder, decoder, None, CPU)
    assert compiled == []
    compile_parts(loop_config(compile=["unet", "text_encoder"]), encoder, decoder, None, CPU)
    assert compiled == [decoder.unet, *decoder.text_encoder.encoder.layers]
    compiled.clear()
    compile_parts(loop_config(compile="auto"), encoder, decoder, None, torch.device("cuda"))
    florence = encoder.backbone.model
    language = florence.language_model
    layers = [*language.encoder.layers, *language.decoder.layers]
    assert compiled == [florence.vision_tower, decoder.vae.encoder, decoder.unet, *layers]


@pytest.mark.slow
def test_like_layers_share_a_translation_and_captions_are_written_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    translations, compile_module = CompileCounter(), torch.nn.Module.compile  # type: ignore[no-untyped-call]

    def counted(module: torch.nn.Module, dynamic: bool | None) -> None:
        compile_module(module, backend=translations, dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    monkeypatch.setattr(precision_module, "why_no_compiler", lambda _: "")
    plain, decoder = tiny.make_caption_decoder(), tiny.make_caption_decoder()
    compile_parts(
        loop_config(compile=["llm"]), tiny.make_encoder(), tiny.make_decoder(), decoder, CPU
    )
    assert len(repeated_layers(decoder.llm)) == decoder.llm.config.num_hidden_layers == 2
    c = torch.randn(2, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    for texts in (["a red cube", "a sphere"], ["a", "a small blue sphere on the floor"]):
        torch.testing.assert_close(decoder.loss(c, texts), plain.loss(c, texts))
    # one where transformers makes a mask, one where it makes none
    assert translations.frame_count == 2
    with torch.no_grad():
        assert decoder.generate(c, max_new_tokens=4) == plain.generate(c, max_new_tokens=4)
    assert translations.frame_count == 2


def test_rows_of_layers_are_found_wherever_they_stand() -> None:
    rows = torch.nn.ModuleDict(
        {
            "one": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]),
            "mixed": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU()]),
            "deep": torch.nn.Sequential(torch.nn.ModuleList([torch.nn.ReLU()])),
        }
    )
    assert repeated_layers(rows) == [*rows["one"], *rows["deep"][0]]


def test_what_cannot_be_compiled_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, decoder = tiny.make_encoder(), tiny.make_decoder()
    with pytest.raises(ConfigError, match="names llm, which this run does not have"):
        compile_parts(loop_config(compile=["llm"]), encoder, decoder, None, CPU)
    monkeypatch.setattr(precision_module, "why_no_compiler", lambda _: "no C++ compiler was found")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler was found; set it to none"):
        compile_parts(loop_config(compile=["unet"]), encoder, decoder, None, CPU)
