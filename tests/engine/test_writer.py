"""Captions by an engine at an address: the same tokens as our own loop, or one sentence."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import tiny
from tests.endpoint.server import always
from tests.engine.server import EngineServer
from vlv.engine import EngineSettings, engine_writes, saved_language_model
from vlv.errors import ConfigError, EndpointError, RequestError

if TYPE_CHECKING:
    from tests.endpoint.server import Script
    from vlv.models.captioner import CaptionDecoder

LENGTH = 12


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlv.engine.connection.backoff", lambda *_: 0.001)


@contextmanager
def engine(
    decoder: CaptionDecoder, folder: Path, script: Script | None = None, **settings: Any
) -> Iterator[EngineServer]:
    """An engine that writes for the decoder."""
    with EngineServer(decoder, folder.name, script) as server:
        with engine_writes(decoder, EngineSettings(url=server.url, **settings)):
            yield server
        assert decoder.writer is None


def test_the_tokens_are_those_of_our_own_loop(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    end = decoder.tokenizer.convert_ids_to_tokens(decoder.generate(c, max_new_tokens=4)[0].ids[3])
    ways: list[dict[str, Any]] = [
        {"max_new_tokens": LENGTH},
        {"max_new_tokens": 1},
        {"max_new_tokens": LENGTH, "end_token": end},
        {"max_new_tokens": LENGTH, "tidy": True},
    ]
    own = [decoder.generate(c, **way) for way in ways]
    assert any(caption.finished for caption in own[2])
    with engine(decoder, folder) as server:
        found = [decoder.generate(c, **way) for way in ways]
        single = decoder.generate(c[1:2], max_new_tokens=LENGTH)
        assert server.keys == {None}
        assert {body["temperature"] for body in server.bodies} == {0.0}
    assert found == own
    assert [[x.ids for x in way] for way in found] == [[x.ids for x in way] for way in own]
    assert single == own[0][1:2]


def test_a_sample_belongs_to_its_prefix_and_its_seed(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    how: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 6}
    with engine(decoder, folder) as server:
        first = decoder.generate(c, seed=[1, 2, 3, 4, 2**63 - 1], **how)
        assert decoder.generate(c[3:4], seed=[4], **how) == first[3:4]
        assert decoder.generate(c, seed=5, **how) != first
        body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.8, 0.9, 0)


def test_candidates_of_an_image_come_one_after_the_other(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    from vlv.models.decoding import Generation

    seeds = list(range(10))
    how = Generation(max_new_tokens=6, do_sample=True, seed=seeds)
    with engine(decoder, folder):
        both = decoder.write(c, how, copies=2)
        rows = c.repeat_interleave(2, 0)
        assert decoder.write(rows, how) == both


def test_what_an_engine_would_answer_with_nonsense_is_not_sent(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    broken = c.clone()
    broken[2, 0, 0] = torch.nan
    with engine(decoder, folder) as server:
        with pytest.raises(ConfigError, match="prefix of caption 3 of 5 holds NaN or infinity"):
            decoder.generate(broken, max_new_tokens=LENGTH)
        with pytest.raises(ConfigError, match="greedily or samples; leave num_beams"):
            decoder.generate(c, num_beams=2)
        with pytest.raises(ConfigError, match="repetition_penalty at 1"):
            decoder.generate(c, repetition_penalty=1.2)
        assert server.requests == 0
    with (
        EngineServer(decoder, folder.name, max_length=20) as server,
        engine_writes(decoder, EngineSettings(url=server.url)),
        pytest.raises(
            ConfigError, match=r"has 20 positions, but 8 of the prefix and 13 .* at most 12"
        ),
    ):
        decoder.generate(c, max_new_tokens=13)


@pytest.mark.slow
def test_errors_that_pass_are_borne(decoder: CaptionDecoder, folder: Path, c: torch.Tensor) -> None:
    own = decoder.generate(c, max_new_tokens=LENGTH)
    faults = [
        "429 0",
        "500",
        "503",
        "reset",
        "malformed",
        "truncated",
        "missing",
        "choices 2",
        "choices 0",
    ]
    faults += ["foreign", "reason abort", "short", "endless-caption", "no-ids", "slow"]
    for fault in faults:
        script = lambda _, times, fault=fault: fault if times == 0 else "ok"  # noqa: E731
        with engine(decoder, folder, script) as server:
            assert decoder.generate(c, max_new_tokens=LENGTH) == own, fault
            assert server.requests == (5 if fault == "slow" else 10), fault


@pytest.mark.slow
def test_errors_that_do_not_pass_are_one_sentence(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    for fault, said in [
        ("500", r"gives no caption: HTTP 500: scripted 500 \(3 tries\)"),
        ("choices 2", "has 2 choices, and one was asked for"),
        ("malformed", "the engine's answer is no JSON"),
        ("foreign", "tokens that the language model does not know"),
        ("no-ids", "no token_ids; vLLM 0.11 or newer"),
        ("429 100000", "rate|HTTP 429"),
    ]:
        with (
            engine(decoder, folder, always(fault), retries=2),
            pytest.raises(EndpointError, match=said),
        ):
            decoder.generate(c, max_new_tokens=LENGTH)


def test_a_refused_request_is_not_repeated(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    with engine(decoder, folder, always("400")) as server:
        with pytest.raises(RequestError, match="HTTP 400: scripted 400"):
            decoder.generate(c[:1], max_new_tokens=LENGTH)
        assert server.requests == 1


def test_an_engine_that_hangs_is_given_up(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    with (
        engine(decoder, folder, always("hang"), timeout=0.1, retries=1),
        pytest.raises(EndpointError, match=r"no answer in 0\.1 s"),
    ):
        decoder.generate(c, max_new_tokens=LENGTH)


def test_another_model_and_an_address_without_engine_are_named(
    decoder: CaptionDecoder, folder: Path
) -> None:
    with (
        EngineServer(decoder, "qwen") as server,
        pytest.raises(ConfigError, match=rf"serves qwen, and not .*vllm serve .*{folder.name}"),
        engine_writes(decoder, EngineSettings(url=server.url)),
    ):
        pass
    with (
        pytest.raises(EndpointError, match="is the engine running, and the address right"),
        engine_writes(decoder, EngineSettings(url="http://127.0.0.1:9/v1")),
    ):
        pass
    assert decoder.writer is None


def test_the_key_of_an_address_comes_from_the_environment(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_KEY", "of-the-engine")
    with engine(decoder, folder, key_env="ENGINE_KEY") as server:
        decoder.generate(c[:1], max_new_tokens=2)
        assert server.keys == {"Bearer of-the-engine"}


def test_the_language_model_can_leave_this_process(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    own, light = decoder.generate(c, max_new_tokens=LENGTH), copy.deepcopy(decoder)
    light.tokenizer = decoder.tokenizer
    with (
        EngineServer(decoder, folder.name) as server,
        engine_writes(light, EngineSettings(url=server.url), release=True),
    ):
        assert all(p.is_meta for p in light.llm.parameters())
        assert light.device == c.device
        assert light.generate(c, max_new_tokens=LENGTH) == own


def test_instructions_are_embedded_here(
    decoder: CaptionDecoder, folder: Path, c: torch.Tensor
) -> None:
    light = copy.deepcopy(decoder)
    light.tokenizer, light.config.answers_questions = decoder.tokenizer, True
    prompts = ["How many?", None, "Short.", "How many?", None]
    own = light.generate(c, prompt=prompts, max_new_tokens=LENGTH)
    with (
        EngineServer(decoder, folder.name) as server,
        engine_writes(light, EngineSettings(url=server.url), release=True),
    ):
        assert light.generate(c, prompt=prompts, max_new_tokens=LENGTH) == own


def test_an_engine_follows_weights_that_train(c: torch.Tensor) -> None:
    trained = tiny.make_caption_decoder()
    folder = saved_language_model(trained, untied=True)
    first, moved = trained.generate(c, max_new_tokens=LENGTH), []
    with EngineServer(copy.deepcopy(trained), folder.name) as server:
        with engine_writes(trained, EngineSettings(url=server.url), follow=True):
            assert trained.generate(c, max_new_tokens=LENGTH) == first
            assert server.reloads == 0  # it has them
            optimizer = torch.optim.AdamW(trained.trainable("mlp+llm"), lr=0.1)
            for count in (1, 2):
                trained.loss(c, ["a red cube"] * len(c)).backward()
                optimizer.step()
                moved.append(trained.generate(c, max_new_tokens=LENGTH))
                assert trained.generate(c[:1], max_new_tokens=LENGTH) == moved[-1][:1]
                assert server.reloads == count
        assert trained.generate(c, max_new_tokens=LENGTH) == moved[-1] != first
    assert not list(Path(tempfile.gettempdir()).glob("vlv-engine-*"))


def test_settings_that_contradict_each_other_are_refused() -> None:
    for settings in (
        {},
        {"python": "python3", "url": "http://127.0.0.1:9/v1"},
        {"python": "python3", "key_env": "KEY"},
        {"url": "http://127.0.0.1:9/v1", "arguments": ("--seed=1",)},
        {"python": "python3", "concurrency": 0},
        {"python": "python3", "wait": 0},
    ):
        with pytest.raises(ConfigError):
            EngineSettings(**settings)  # type: ignore[arg-type]
