"""What a service answers is what the pipeline answers, whatever batch a request falls into."""

from __future__ import annotations

import asyncio
import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.conftest import Vlv, vlv
from tests.instructed import PLAIN
from tests.serve.conftest import MODEL, Asked, Make, assert_refused, chat, image, png, url
from vlv.models.calibration import Calibration, Logistic
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.claims import find_claims

__all__ = ["vlv"]  # a fixture
CHAT = "/v1/chat/completions"


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def picture(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


def assert_same_image(a: Image.Image, b: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


async def together(asked: Asked, *requests: tuple[str, Any]) -> list[httpx.Response]:
    """Answers to requests that are all in the queue before the model begins."""
    answers = asyncio.create_task(asked.ask(*requests))
    while asked.service.batcher.num_waiting < len(requests):
        await asyncio.sleep(0.001)
    asked.service.batcher.start()
    return await answers


def test_concurrent_captions_are_those_of_the_command(
    make: Make, vlv: Vlv, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        (folder / f"{seed}.png").write_bytes(png(image(seed, (40, 33))))
    options = ("--model", tiny_folder, "--max-new-tokens", 8, "--output", "-")
    lines = vlv("caption", folder, *options).out.splitlines()
    wanted = [row["caption"] for row in map(json.loads, lines)]
    asked = make(start=False, batch_size=4)
    answers = asyncio.run(
        together(asked, *((CHAT, chat(f"{_url(folder / f'{seed}.png')}")) for seed in range(6)))
    )
    assert [text_of(answer) for answer in answers] == wanted
    metrics = asked.one("/metrics").text
    assert 'vlv_batch_items_bucket{kind="caption",le="2.0"} 1.0' in metrics
    assert 'vlv_batch_items_bucket{kind="caption",le="4.0"} 2.0' in metrics


def _url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_sampled_captions_belong_to_their_seed(make: Make, tiny_pipeline: VLVPipeline) -> None:
    def wanted(picture: int, seed: int, count: int = 1) -> list[str]:
        options = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8}
        return tiny_pipeline.caption([image(picture)] * count, seed=seed, **options)

    asked = make(start=False, seed=5)
    one = {"temperature": 1.0, "top_p": 0.9}
    requests = [
        chat(url(0), seed=1, **one),
        chat(url(1), seed=2, **one),
        chat(url(0), **one),  # the server's own seed
        chat(url(0), top_p=0.9, seed=1),  # sampling, too
        chat(url(0)),
    ]
    answers = asyncio.run(together(asked, *((CHAT, body) for body in requests)))
    texts = [text_of(answer) for answer in answers]
    greedy = tiny_pipeline.caption(image(0), max_new_tokens=8)
    assert texts == [*wanted(0, 1), *wanted(1, 2), *wanted(0, 5), *wanted(0, 1), greedy]
    several = asked.one(CHAT, chat(url(0), seed=1, n=3, **one)).json()
    choices = [choice["message"]["content"] for choice in several["choices"]]
    assert choices == wanted(0, 1, 3)
    assert len(set(choices)) == 3


def test_a_chat_completion_counts_and_says_what_was_not_used(asked: Asked) -> None:
    body = chat()
    body["messages"][0]["content"].append({"type": "text", "text": "In one sentence, please."})
    body |= {"user": "me", "frequency_penalty": 0, "tools": None, "n": 2, "temperature": 0}
    answer = asked.one(CHAT, body).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["message"] == answer["choices"][1]["message"]
    assert answer["choices"][0]["finish_reason"] in {"stop", "length"}
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 8  # of the caption embedding
    assert 2 <= usage["completion_tokens"] <= 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "takes no instruction" in answer["warnings"][0]
    assert "warnings" not in asked.one(CHAT, chat()).json()


def test_instructions_are_followed_each_by_itself(
    make: Make, instructed_pipeline: VLVPipeline
) -> None:
    asked = make(pipe=instructed_pipeline, start=False)

    def wanted(text: str | None = None, **more: Any) -> tuple[str, Any]:
        body = chat(max_tokens=20, **more)
        if text is not None:
            body["messages"][0]["content"].append({"type": "text", "text": text})
        return CHAT, body

    found = asyncio.run(
        together(asked, wanted(), wanted("is it a cube?"), wanted(style="short"), wanted("Short:"))
    )
    assert [text_of(answer) for answer in found] == [PLAIN, "yes", "A cube.", "A cube."]
    assert not any("warnings" in answer.json() for answer in found)
    assert text_of(asked.one(*wanted(style="short", words=3))) == "A red cube."
    assert text_of(asked.one(*wanted(known="5 m wide"))) == "A cube, 5 m wide."
    refused = asked.one(*wanted(style="shrot"))
    assert "did you mean short?" in assert_refused(refused, 400, "invalid_value")
    both = asked.one(*wanted("is it a cube?", style="short"))
    assert text_of(both) == "A cube."
    assert "was not used" in both.json()["warnings"][0]


def test_words_are_included_and_excluded(make: Make, instructed_pipeline: VLVPipeline) -> None:
    asked = make(pipe=instructed_pipeline)
    word = "incomprehensibility"
    answer = asked.one(CHAT, chat(include=["cube", word], max_tokens=20))
    assert text_of(answer) == PLAIN
    assert answer.json()["warnings"] == [f"choice 0 lacks '{word}'"]
    without = text_of(asked.one(CHAT, chat(exclude=["Large"])))
    assert "large" not in without.lower().split()
    refused = asked.one(CHAT, chat(exclude=["cube"], include=["cube"]))
    assert "to be excluded" in assert_refused(refused, 400, "invalid_value")


def test_an_answer_follows_a_schema(asked: Asked) -> None:
    pytest.importorskip("llguidance", reason='needs llguidance: pip install "vlv[json]"')
    schema: dict[str, Any] = {"enum": ["cube", "cone"]}
    form = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}}
    answer = asked.one(CHAT, chat(response_format=form, max_tokens=20))
    assert json.loads(text_of(answer)) in schema["enum"]
    schema["enum"] = 5
    refused = asked.one(CHAT, chat(response_format=form))
    assert "schema cannot be followed" in assert_refused(refused, 400, "invalid_value")


def test_a_plain_model_takes_no_style(asked: Asked) -> None:
    answer = asked.one(CHAT, chat(style="short"))
    assert "knows no styles" in assert_refused(answer, 400, "invalid_value")
    answer = asked.one(CHAT, chat(words=9))
    assert "so many words" in assert_refused(answer, 400, "invalid_value")


def test_a_stream_holds_the_same_caption(asked: Asked) -> None:
    whole = text_of(asked.one(CHAT, chat()))
    answer = asked.one(CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    pieces = [choice["delta"].get("content", "") for x in chunks for choice in x["choices"]]
    assert "".join(pieces) == whole
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[0]["usage"] is None


def test_embeddings_are_those_of_the_pipeline(asked: Asked, tiny_pipeline: VLVPipeline) -> None:
    wanted = tiny_pipeline.embed([image(0), image(1)])
    answer = asked.one("/v1/embed", {"images": [url(0), url(1)]}).json()
    found = torch.tensor([row["embedding"] for row in answer["data"]])
    torch.testing.assert_close(found, wanted)
    body = {"images": [url(0)], "encoding_format": "base64", "model": MODEL}
    (row,) = asked.one("/v1/embed", body).json()["data"]
    numbers = np.frombuffer(base64.b64decode(row["embedding"]), "<f4").reshape(row["shape"])
    torch.testing.assert_close(torch.tensor(numbers), wanted[0])


def test_images_are_those_of_the_pipeline(asked: Asked, tiny_pipeline: VLVPipeline) -> None:
    how = {"steps": 2, "guidance": 1.5, "sampler": "ddim", "seed": 3}
    answer = asked.one("/v1/reconstruct", {"image": url(0), **how})
    assert_same_image(picture(answer), tiny_pipeline.reconstruct(image(0), **how))
    assert answer.json()["seed"] == 3
    answer = asked.one("/v1/generate", {"prompt": "A red cube.", **how})
    assert_same_image(picture(answer), tiny_pipeline.generate("A red cube.", **how))
    mix = {"images": [url(0), url(1)], "mode": "average", "weights": [1, 3]}
    answer = asked.one("/v1/mix", {**mix, **how})
    z = tiny_pipeline.mix([image(0), image(1)], mode="average", weights=[1, 3])
    assert_same_image(picture(answer), tiny_pipeline.reconstruct(z=z, **how))


def test_questions_are_answered_as_by_the_pipeline(
    make: Make, asked: Asked, instructed_pipeline: VLVPipeline
) -> None:
    taught = make(pipe=instructed_pipeline)
    for question, text in (("is it a cube?", "yes"), ("how many objects are there?", "two")):
        wanted = instructed_pipeline.ask(image(0), question)
        answer = taught.one("/v1/ask", {"image": url(0), "question": question}).json()
        assert (answer["answer"], answer["finished"]) == (text, True)
        assert answer["yes"] == (
            None if wanted.yes is None else pytest.approx(wanted.yes, abs=1e-4)
        )
    body = {"image": url(0), "question": "is it a cube?"}
    assert "was not taught" in assert_refused(asked.one("/v1/ask", body), 400, "invalid_value")
    for more, code in (
        ({"question": " "}, "limit_exceeded"),
        ({"max_tokens": 10**6}, "limit_exceeded"),
    ):
        assert_refused(taught.one("/v1/ask", body | more), 400, code)


def test_verification_is_that_of_the_pipeline(asked: Asked, tiny_pipeline: VLVPipeline) -> None:
    captions = ["A red cube.", "Two blue cylinders under a low sun."]
    wanted = tiny_pipeline.score(image(0), captions)
    answer = asked.one("/v1/verify", {"image": url(0), "captions": captions}).json()
    assert [row["caption"] for row in answer["data"]] == captions
    assert [row["score"] for row in answer["data"]] == pytest.approx(wanted.recovered, abs=1e-4)
    assert answer["best"] == wanted.best
    assert answer["margin"] == pytest.approx(wanted.margin, abs=1e-4)


def test_doubts_are_those_of_the_pipeline(
    asked: Asked, tiny_pipeline: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"image": url(0), "captions": ["A red cube. It is big.", "A cone."], "doubts": True}
    assert_refused(asked.one("/v1/verify", body), 501, "unsupported")
    line, both = Logistic((1.0,), 0.0), Logistic((1.0, 0.0), 0.0)
    calibration = Calibration(0.01, 0.4, line, both, both, claims="toyworld")
    monkeypatch.setattr(tiny_pipeline, "calibration", calibration)
    rows = asked.one("/v1/verify", body).json()["data"]
    for row, caption in zip(rows, body["captions"], strict=True):
        wanted = tiny_pipeline.verify(image(0), caption, read_claims=find_claims)
        assert row["caption"] == caption
        assert row["score"] == pytest.approx(wanted.score, abs=1e-4)
        assert [x["text"] for x in row["sentences"]] == [x.text for x in wanted.sentences]
        assert row["doubt"] == pytest.approx(wanted.doubt, abs=1e-3)
        assert row["fixed"] == wanted.fixed


def test_a_bad_item_spoils_no_other(make: Make, tiny_pipeline: VLVPipeline) -> None:
    class Choosy:
        """Fails on every batch that holds a certain prompt."""

        image_size, framing = tiny_pipeline.image_size, tiny_pipeline.framing

        def generate(self, texts: list[str], **options: Any) -> list[Image.Image]:
            if "bad" in texts:
                raise RuntimeError("/secret/path")
            return [image(len(text)) for text in texts]

    asked = make(start=False, pipe=Choosy())
    prompts = ["a", "bad", "ccc", "dddd"]
    answers = asyncio.run(
        together(asked, *(("/v1/generate", {"prompt": prompt}) for prompt in prompts))
    )
    assert_refused(answers[1], 500, "internal_error")
    for answer, length in zip([answers[0], *answers[2:]], (1, 3, 4), strict=True):
        assert_same_image(picture(answer), image(length))
    assert asked.one("/ready").status_code == 200
    for _ in range(3):
        assert_refused(asked.one("/v1/generate", {"prompt": "bad"}), 500, "internal_error")
    assert asked.one("/ready").status_code == 503
    assert asked.one("/health").status_code == 200


def test_a_model_without_a_part_says_so(make: Make, tiny_folder: Path) -> None:
    asked = make(pipe=VLVPipeline.from_pretrained(tiny_folder, parts=["embed"]))
    assert_refused(asked.one(CHAT, chat()), 501, "unsupported")
    assert asked.one("/v1/embed", {"images": [url()]}).status_code == 200


def test_the_model_is_listed(asked: Asked) -> None:
    (entry,) = asked.one("/v1/models").json()["data"]
    assert (entry["id"], entry["object"]) == (MODEL, "model")
