"""Captions by a JSON schema: whole ones follow it, at every batch size, beam count and temperature."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest

from tests.models.test_instructions import images
from vlv.errors import ConfigError
from vlv.models.json_writing import checked_schema
from vlv.models.pipeline import VLVPipeline

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "name": {"type": "string", "maxLength": 4},
    },
    "required": ["size", "count", "name"],
    "additionalProperties": False,
}


def assert_follows(text: str) -> None:
    found = json.loads(text)
    assert list(found) == list(SCHEMA["required"])
    assert found["size"] in ("small", "large")
    assert found["count"] in range(10)
    assert len(found["name"]) <= 4


@pytest.fixture(autouse=True)
def needed() -> None:
    pytest.importorskip("llguidance", reason='needs llguidance: pip install "vlv[json]"')


@pytest.mark.parametrize(
    "how",
    [
        {},
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        pytest.param({"do_sample": True, "temperature": 2.0, "top_p": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_captions_follow_the_schema(instructed_pipeline: VLVPipeline, how: dict[str, Any]) -> None:
    pipe, given = instructed_pipeline, images(3)
    written = pipe.describe(given, schema=SCHEMA, max_new_tokens=60, batch_size=3, **how)
    for caption in written:
        assert caption.finished
        assert_follows(caption.text)
    text = json.dumps(SCHEMA)
    assert pipe.describe(given, schema=text, max_new_tokens=60, batch_size=2, **how) == written
    if not how:
        (cut,) = pipe.describe(given[0], schema=SCHEMA, max_new_tokens=6)
        assert not cut.finished
        assert written[0].text.startswith(cut.text)


def test_a_model_that_has_written_json_can_be_copied(instructed_pipeline: VLVPipeline) -> None:
    decoder = copy.deepcopy(instructed_pipeline.caption_decoder)
    assert decoder is not None
    c = instructed_pipeline.context(instructed_pipeline.embed(images(1))).sequence
    (caption,) = decoder.generate(c, schema=SCHEMA)
    again = copy.deepcopy(decoder)
    assert again.generate(c, schema=SCHEMA) == [caption]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "give a JSON schema, which is an object"),
        ([1], "give a JSON schema"),
        ({1, 2}, "give a JSON schema"),
        ({"type": "objekt"}, "the schema cannot be followed: Invalid type: objekt"),
        ({"not": {}}, "cannot be followed: Unimplemented keys"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
    ],
)
def test_what_is_no_schema(schema: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_schema(schema)


def test_a_schema_goes_with_no_other_rule(tiny_pipeline: VLVPipeline) -> None:
    for other in ({"exclude": "red"}, {"include": "red"}, {"tidy": True}, {"end_token": "."}):
        with pytest.raises(ConfigError, match="a caption by a schema is JSON; leave"):
            tiny_pipeline.caption(images(1), schema=SCHEMA, **other)
    with pytest.raises(ConfigError, match="plain captions are verified"):
        tiny_pipeline.caption(images(1), schema=SCHEMA, verify=2)


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r'pip install "vlv\[json\]"'):
        checked_schema({"type": "null"})
