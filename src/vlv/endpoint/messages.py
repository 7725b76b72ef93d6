"""What is asked and what is answered, in the form of OpenAI's chat completions."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vlv.errors import OutputError
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.endpoint.settings import Endpoint

Message = Json

IMAGE_TOKENS = 1000
"""What an image is taken to cost, in tokens, before the endpoint has said what it does cost."""

_MOST_TOKENS = 2**24
"""Of a prompt or an answer; a server that counts more is not believed."""
_MAGIC = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}


@dataclass(frozen=True)
class ChatRequest:
    """One request.

    Attributes:
        messages: The conversation; made by `user`.
        max_tokens: Longest answer, in the model's tokens; None leaves it to the server.
        temperature: Sampling temperature; None leaves it to the server.
        seed: Seed of the sampling; a server may ignore it.
    """

    messages: Sequence[Message]
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def payload(self, endpoint: Endpoint) -> bytes:
        """The body as it is sent: the same request gives the same bytes."""
        body: Json = {"model": endpoint.model, "messages": list(self.messages)}
        given = {
            endpoint.token_field: self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        body |= {name: value for name, value in given.items() if value is not None}
        body |= endpoint.extra
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    def guess_prompt_tokens(self) -> int:
        """A rough size of the prompt: a token for four characters, `IMAGE_TOKENS` for an image."""
        tokens = 0
        for message in self.messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                tokens += len(part["text"]) // 4 if part["type"] == "text" else IMAGE_TOKENS
        return tokens


def user(text: str, *images: bytes) -> Message:
    """What the user says, with images (files of JPEG, PNG, WebP or GIF) before the text."""
    if not images:
        return {"role": "user", "content": text}
    parts = [image_part(image) for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def image_part(data: bytes) -> Json:
    """An image file as a data URL; nothing is ever fetched by the server.

    Raises:
        ValueError: The bytes are of none of the formats that endpoints read.
    """
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        raise ValueError("an image for an endpoint must be JPEG, PNG, WebP or GIF")
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: The answer; empty when there is none.
        finish_reason: ``stop``, ``length`` (cut at the token limit), ``content_filter``, or what the server says.
        model: The model that answered, as the server calls it.
        prompt_tokens: Tokens of the prompt; guessed where the server does not count them.
        completion_tokens: Tokens of the answer, hidden reasoning included; likewise.
        refusal: Why the model declines, where the server says so apart from the text.
        usd: What it cost, by the prices given.
    """

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    refusal: str | None = None
    usd: float = 0.0

    def to_json(self) -> str:
        """As text, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """An answer out of the store.

        Raises:
            OutputError: The store is damaged.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise OutputError(
                f"an answer in the store is damaged ({error}); remove the store"
            ) from error


def parse_answer(raw: bytes, guessed_prompt_tokens: int) -> Answer:
    """Read the body of a response.

    Raises:
        ValueError: It is no JSON, or lacks a field; the message says which.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError(f"the answer is no JSON: {_shown(raw)}") from None
    choice = _field(_first(_field(body, "choices", list)), "message", dict, within=True)
    message = choice["message"]
    refusal = message.get("refusal")
    text = _text(message.get("content"), optional=bool(refusal) or _filtered(choice))
    usage = body.get("usage")
    counts = [
        usage.get(name) if isinstance(usage, dict) else None
        for name in ("prompt_tokens", "completion_tokens")
    ]
    counted = all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts)
    prompt, completion = counts if counted else (guessed_prompt_tokens, len(text) // 4)
    return Answer(
        text,
        utf8(str(choice.get("finish_reason") or "stop")),
        utf8(str(body.get("model") or "")),
        int(prompt or 0),
        int(completion or 0),
        utf8(str(refusal)) if refusal else None,
    )


def _filtered(choice: Mapping[str, Any]) -> bool:
    """Whether a missing text is the server's doing: withheld, or used up by hidden reasoning."""
    return str(choice.get("finish_reason")).startswith(("content_filter", "length"))


def _field(body: Any, name: str, kind: type, *, within: bool = False) -> Any:
    value = body.get(name) if isinstance(body, dict) else None
    if isinstance(value, kind):
        return body if within else value
    raise ValueError(f"the answer has no {name}: {_shown(json.dumps(body).encode())}")


def _first(choices: list[Any]) -> Any:
    if not choices:
        raise ValueError("the answer has no choices: the list is empty")
    return choices[0]


def _text(content: Any, *, optional: bool) -> str:
    if isinstance(content, list):  # parts, as some servers write them
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    if isinstance(content, str):
        return utf8(content)
    if content is None and optional:
        return ""
    raise ValueError("the answer has no message.content")


def utf8(text: str) -> str:
    r"""Text that can be written: half a character of UTF-16, which JSON may hold, becomes a question mark.

    >>> utf8("a \ud83d b")
    'a ? b'
    """
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _shown(raw: bytes) -> str:
    text = " ".join(raw[:200].decode("utf-8", errors="replace").split())
    return repr(text[:120])
