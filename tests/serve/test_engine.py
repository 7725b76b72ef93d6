"""A service whose captions an engine writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import tiny
from tests.engine.server import EngineServer
from tests.serve.conftest import Make, assert_refused, chat, url
from vlv.engine import EngineSettings, engine_writes, saved_language_model

if TYPE_CHECKING:
    from pathlib import Path

CHAT = "/v1/chat/completions"


def test_its_captions_are_ours_and_a_broken_engine_is_an_error_of_the_server(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("vlv.engine.connection.backoff", lambda *_: 0.001)
    pipe, works = tiny.make_pipeline(), [True]
    assert pipe.caption_decoder is not None
    name = saved_language_model(pipe.caption_decoder).name
    requests = [(CHAT, chat(url(seed), temperature=t)) for seed in range(3) for t in (0, 0.9)]
    own = [answer.json()["choices"] for answer in make(pipe=pipe)(*requests)]
    script = lambda *_: "ok" if works[0] else "500"  # noqa: E731
    with EngineServer(tiny.make_caption_decoder(), name, script) as server:
        settings = EngineSettings(url=server.url, retries=1)
        with engine_writes(pipe.caption_decoder, settings, release=True):
            asked = make(pipe=pipe)
            # the engine of this test draws as our own loop does
            assert [answer.json()["choices"] for answer in asked(*requests)] == own
            assert server.requests == len(requests)
            assert "prompt_embeds" in server.bodies[0]
            # embeddings of clients go nowhere
            assert_refused(
                asked.one(CHAT, chat() | {"prompt_embeds": "AAAA"}), 400, "unsupported_parameter"
            )
            works[0] = False
            for _ in range(3):
                assert_refused(asked.one(*requests[0]), 503, "engine")
            assert asked.one("/ready").status_code == 503
            works[0] = True
            assert asked.one(*requests[0]).json()["choices"] == own[0]
            assert asked.one("/ready").status_code == 200
