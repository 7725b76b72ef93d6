"""Pace, ledger, store and messages on their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from vlv.endpoint import Answer, ChatRequest, Endpoint, KeyedStore, image_part, user
from vlv.endpoint.messages import IMAGE_TOKENS, parse_answer
from vlv.endpoint.pace import Pace, backoff, retry_after
from vlv.errors import OutputError

ENDPOINT = Endpoint("http://127.0.0.1:8000/v1/", "m", extra={"reasoning_effort": "none"})


def reply(**message: object) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


def test_pace_spaces_evenly_and_takes_corrections() -> None:
    now = 0.0
    pace = Pace(60, clock=lambda: now)
    assert [pace.reserve() for _ in range(3)] == [0, 1, 2]
    now = 10.0
    assert pace.reserve(5) == 0  # what was not used is not saved up
    assert pace.reserve() == 5
    pace.correct(-3)
    assert pace.reserve() == 3


def test_backoff_doubles_up_to_its_limit_and_follows_the_seed() -> None:
    waits = [max(backoff(n, 1.0, 10.0, Random(seed)) for seed in range(200)) for n in range(6)]
    assert all(
        0.9 * limit < wait <= limit for wait, limit in zip(waits, [1, 2, 4, 8, 10, 10], strict=True)
    )
    assert backoff(3, 1.0, 10.0, Random(5)) == backoff(3, 1.0, 10.0, Random(5))


@pytest.mark.parametrize(
    "header",
    ["inf", "nan", "-", "", "Wed, 99 Oct", "Wed, 21 Oct " + "9" * 30 + " 07:28:00 GMT", "1e999"],
)
def test_a_retry_after_that_says_nothing(header: str) -> None:
    assert retry_after(header) is None


def test_the_same_request_gives_the_same_bytes() -> None:
    request = ChatRequest([user("Hä?", b"\x89PNG..")], max_tokens=7, temperature=0.0, seed=1)
    body = json.loads(request.payload(ENDPOINT))
    assert request.payload(ENDPOINT) == request.payload(ENDPOINT)
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("m", 7, 0, 1)
    assert body["reasoning_effort"] == "none"
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "Hä?"}
    assert request.guess_prompt_tokens() == IMAGE_TOKENS
    assert ENDPOINT.url == "http://127.0.0.1:8000/v1/chat/completions"
    other = Endpoint("http://127.0.0.1/v1", "m", token_field="max_completion_tokens")
    assert json.loads(request.payload(other))["max_completion_tokens"] == 7


def test_only_images_are_sent_as_images() -> None:
    with pytest.raises(ValueError, match="must be JPEG, PNG, WebP or GIF"):
        image_part(b"#!/bin/sh")


def test_an_answer_survives_the_store() -> None:
    answer = parse_answer(reply(content="Grün."), guessed_prompt_tokens=9)
    assert (answer.text, answer.prompt_tokens) == ("Grün.", 9)
    assert Answer.from_json(answer.to_json()) == answer


def test_half_a_character_does_no_harm(tmp_path: Path) -> None:
    raw = b'{"choices": [{"message": {"content": "A \\ud83d cat"}, "finish_reason": "\\ud83d"}]}'
    answer = parse_answer(raw, 1)
    assert (answer.text, answer.finish_reason) == ("A ? cat", "?")
    with KeyedStore(tmp_path / "s.sqlite") as store:
        store.put(b"a", answer.to_json())
        assert Answer.from_json(store.get(b"a") or "") == answer


def test_answers_in_parts_and_refusals() -> None:
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]
    assert parse_answer(reply(content=parts), 1).text == "One two."
    refused = parse_answer(reply(content=None, refusal="no"), 1)
    assert (refused.text, refused.refusal) == ("", "no")


@pytest.mark.parametrize("count", [-1, 2**60, 10**30, "20", 2.5, True, None, [20], float("nan")])
def test_counts_of_tokens_that_cannot_be_are_guessed(count: object) -> None:
    body = json.loads(reply(content="A red cube here."))
    for name in ("prompt_tokens", "completion_tokens"):
        usage = {"prompt_tokens": 7, "completion_tokens": 20, name: count}
        answer = parse_answer(json.dumps({**body, "usage": usage}).encode(), 50)
        assert (answer.prompt_tokens, answer.completion_tokens) == (50, 4)


def test_a_damaged_answer_of_the_store_is_one_sentence() -> None:
    for text in ("{", "[]", '{"text": 1}', "[" * 100_000):
        with pytest.raises(OutputError, match="an answer in the store is damaged"):
            Answer.from_json(text)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no choices"),
        (b'{"choices": {}}', "no choices"),
        (b'{"choices": []}', "no choices"),
        (b'{"choices": [3]}', "no message"),
        (reply(content=None), "no message.content"),
        (reply(content=3), "no message.content"),
    ],
)
def test_answers_that_are_none(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_answer(raw, 1)


def test_a_killed_process_loses_nothing_that_was_put(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from vlv.endpoint.store import KeyedStore\n"
        "store = KeyedStore(Path(sys.argv[1]))\n"
        "for n in range(10**6): store.put(b'%d' % n, 'x' * n); print(n, flush=True)"
    )
    path = tmp_path / "answers.sqlite"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    last = 0
    for line in process.stdout:
        last = int(line)
        if last == 200:
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    with KeyedStore(path) as store:
        assert len(store) >= last + 1
        assert all(store.get(b"%d" % n) == "x" * n for n in range(last + 1))


def test_store(tmp_path: Path) -> None:
    with KeyedStore(tmp_path / "folder" / "s.sqlite") as store:
        store.put(b"a", '{"n": 2}')
        store.put(b"a", '{"n": 3}')
        store.put(b"b", '{"n": 4, "m": null}')
        assert (len(store), store.total("n"), store.total("m")) == (2, 7.0, 0.0)
        assert (store.get(b"a"), store.get(b"c")) == ('{"n": 3}', None)
        store.clear()
        assert store.get(b"a") is None
