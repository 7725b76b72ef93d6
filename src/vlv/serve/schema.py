"""The bodies of requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vlv.models.arguments import MAX_SEED
from vlv.models.decoding import MOST_WORDS
from vlv.serve.errors import ApiError


def first_fault(errors: Sequence[Mapping[str, Any]], skip: int = 0) -> tuple[str, str]:
    """Where the first thing is wrong that pydantic found, and what, without what was sent.

    Args:
        errors: Of a ValidationError.
        skip: Leading parts of a place that mean nothing to who sent it.

    Returns:
        The place, empty where it is no plain name, and a sentence.
    """
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"][skip:])
    if first["type"] == "json_invalid":
        return "", "the body is no JSON"
    if not _NAMES.fullmatch(where):
        return "", str(first["msg"])
    return where, f"{where}: {first['msg']}"


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_clean)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)]
IMAGE = "A data: URL, or an address that this server may fetch from."
ImageURL = Annotated[str, Field(description=IMAGE)]

_NAMES = re.compile(r"[\w.\- ]{1,80}")
_IGNORED = frozenset(
    {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)
_NEUTRAL: tuple[object, ...] = (None, False, 0, "", [], {}, {"type": "text"})


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Text | None = None


class ImageAddress(BaseModel):
    """Where an image is."""

    url: ImageURL
    detail: str | None = None


class ImagePart(BaseModel):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageAddress


class TextPart(BaseModel):
    """A text of a message."""

    type: Literal["text"]
    text: Text


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class StreamOptions(BaseModel):
    """What a stream holds."""

    include_usage: bool = False


class SchemaOfFormat(BaseModel):
    """A JSON schema with its name, in OpenAI's form."""

    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """Whether an answer is text, or JSON of a schema."""

    type: Literal["text", "json_schema"]
    json_schema: SchemaOfFormat | None = None

    @property
    def content(self) -> dict[str, Any] | None:
        """The schema; None where the answer is text."""
        return self.json_schema.content if self.json_schema and self.type != "text" else None


class ChatBody(_Body):
    """A request for captions, in OpenAI's form."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Text
    messages: list[Message]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    style: Text | None = Field(None, min_length=1)
    words: int | None = Field(None, ge=1, le=MOST_WORDS)
    known: Text | None = Field(None, min_length=1)
    response_format: ResponseFormat | None = None
    include: list[Text] = []
    exclude: list[Text] = []

    @property
    def parts(self) -> list[ImagePart | TextPart]:
        """All parts of all messages, in order."""
        found: list[ImagePart | TextPart] = []
        for message in self.messages:
            content = message.content
            found += [TextPart(type="text", text=content)] if isinstance(content, str) else content
        return found

    @property
    def longest(self) -> int | None:
        """Tokens of a caption at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def refuse_unknown(self) -> None:
        """Refuse a setting that would change nothing here, unless it asks for nothing.

        Raises:
            ApiError: There is one.
        """
        extra: dict[str, Any] = self.model_extra or {}
        for name, value in extra.items():
            if name not in _IGNORED and value not in _NEUTRAL:
                raise ApiError(
                    400,
                    f"{name[:80]} has no effect on this model; leave it out",
                    param=name[:80],
                    code="unsupported_parameter",
                )


class CaptionBody(_Body):
    """A request for captions of one image, in our own form."""

    image: ImageURL
    style: Text | None = Field(None, min_length=1, description="A style that the model was taught.")
    prompt: Text | None = Field(
        None, min_length=1, description="Instead of a style: what is wanted, or a question."
    )
    words: int | None = Field(
        None, ge=1, le=MOST_WORDS, description="Length, of a model that was taught lengths."
    )
    json_schema: dict[str, Any] | None = Field(
        None, description="A JSON schema that the caption follows."
    )
    known: Text | None = Field(
        None, min_length=1, description="What is known about the image, such as tags or a name."
    )
    include: list[Text] = Field([], description="Words that the caption should have.")
    exclude: list[Text] = Field([], description="Words that the caption must not have.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: Seed | None = None


class AskBody(_Body):
    """A question about an image, for a model that was taught to answer."""

    image: ImageURL
    question: Text
    max_tokens: int | None = Field(None, ge=1)


class EmbedBody(_Body):
    """A request for caption embeddings."""

    images: list[ImageURL] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"


class DrawBody(_Body):
    """How an image is drawn."""

    steps: int = Field(20, ge=1)
    guidance: float = Field(2.0, ge=0, le=100)
    sampler: Literal["dpm", "ddim", "ddpm"] = "dpm"
    seed: Seed | None = None


class ReconstructBody(DrawBody):
    """A request for an image out of an image's embedding."""

    image: ImageURL


class GenerateBody(DrawBody):
    """A request for an image out of a text."""

    prompt: Text = Field(min_length=1)


class MixBody(DrawBody):
    """A request for an image out of several images' embeddings."""

    images: list[ImageURL] = Field(min_length=2)
    mode: Literal["concat", "average", "slerp"] = "concat"
    keep: list[int] | None = None
    weights: list[float] | None = None


class VerifyBody(_Body):
    """A request for the judgement of the frozen decoder on captions."""

    image: ImageURL
    captions: list[Text] = Field(min_length=1)
    doubts: bool = False
    """Which sentences and claims are doubtful, too; it takes many passes."""


class SearchBody(_Body):
    """A request for the images of an index that are nearest to a text or to an image; one of the two."""

    text: Text | None = None
    image: ImageURL | None = None
    k: int = Field(10, ge=1, le=1000)
