"""The bodies of answers, in OpenAI's forms where there is one."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlv.jobs.verify import verdict_columns
from vlv.storage import Json

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vlv.models import asking
    from vlv.models.decoding import Caption
    from vlv.models.doubts import Verdict
    from vlv.models.scoring import Scores
    from vlv.search.index import Hit

Answer = Json
TEXT_IS_UNUSED = "the text was not used: this model describes the image and takes no instruction beside its style"


def completion(
    model: str, captions: Sequence[Caption], usage: Answer, *, text_unused: bool
) -> Answer:
    """The captions of an image as a chat completion."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": caption.text, "refusal": None},
            "finish_reason": _reason(caption),
            "logprobs": None,
        }
        for index, caption in enumerate(captions)
    ]
    warnings = [TEXT_IS_UNUSED] if text_unused else []
    warnings += [
        f"choice {index} lacks {', '.join(map(repr, caption.missing))}"
        for index, caption in enumerate(captions)
        if caption.missing
    ]
    answer = {**_head("chat.completion", model), "choices": choices, "usage": usage}
    return answer | ({"warnings": warnings} if warnings else {})


def stream(model: str, captions: Sequence[Caption], usage: Answer, *, include_usage: bool) -> bytes:
    """The same as server-sent events: a caption is one piece, as the model writes whole captions."""
    head = _head("chat.completion.chunk", model)
    chunks: list[Answer] = []
    for index, caption in enumerate(captions):
        delta = {"role": "assistant", "content": caption.text}
        chunks += [
            {**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]},
            {
                **head,
                "choices": [{"index": index, "delta": {}, "finish_reason": _reason(caption)}],
            },
        ]
    if include_usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**head, "choices": [], "usage": usage})
    lines = [*(json.dumps(chunk, ensure_ascii=False) for chunk in chunks), "[DONE]"]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def token_usage(num_prompt: int, captions: Sequence[Caption]) -> Answer:
    """Tokens read, which are those of the caption embedding, and written."""
    written = sum(caption.num_tokens for caption in captions)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": written,
        "total_tokens": num_prompt + written,
    }


def embeddings(model: str, zs: Sequence[Tensor], form: Literal["float", "base64"]) -> Answer:
    """Caption embeddings (Q, D): lists of lists, or the bytes of little-endian float32."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "shape": list(z.shape),
            "embedding": z.tolist() if form == "float" else _base64(z),
        }
        for index, z in enumerate(zs)
    ]
    return {"object": "list", "model": model, "data": data}


def images(model: str, drawn: Sequence[Image.Image], seed: int) -> Answer:
    """Images as PNG files, in the form of OpenAI's images."""
    data = [{"b64_json": base64.b64encode(png(image)).decode("ascii")} for image in drawn]
    return {"created": int(time.time()), "model": model, "seed": seed, "data": data}


def scores(model: str, found: Scores) -> Answer:
    """What the frozen decoder says of the captions of an image."""
    losses = found.losses.mean(1).tolist()
    data = [
        {"object": "score", "index": index, "caption": caption, "score": share, "loss": loss}
        for index, (caption, share, loss) in enumerate(
            zip(found.captions, found.recovered, losses, strict=True)
        )
    ]
    about = {"best": found.best, "margin": found.margin}
    return {"object": "list", "model": model, "data": data, **about}


def answered(model: str, found: asking.Answer) -> Answer:
    """What the model answers, with the probability of yes where the answer is yes or no."""
    about = {"answer": found.text, "yes": found.yes, "finished": found.finished}
    return {"object": "answer", "model": model, **about}


def verdicts(model: str, found: Sequence[Verdict]) -> Answer:
    """Doubts about captions, with the columns of `vlv verify --fix`."""
    data = [
        {
            "object": "verdict",
            "index": index,
            "caption": verdict.caption,
            **verdict_columns(verdict),
            "fixed": verdict.fixed,
        }
        for index, verdict in enumerate(found)
    ]
    return {"object": "list", "model": model, "data": data}


def hits(model: str, found: Sequence[Hit]) -> Answer:
    """Images of an index; where their files lie on the server is nobody's business."""
    data = [
        {
            "object": "hit",
            "index": hit.rank - 1,
            "id": hit.id,
            "score": hit.score,
            "sha256": hit.sha256,
        }
        for hit in found
    ]
    return {"object": "list", "model": model, "data": data}


def models(name: str, created: int) -> Answer:
    """The one model that is served."""
    entry = {"id": name, "object": "model", "created": created, "owned_by": "vlv"}
    return {"object": "list", "data": [entry]}


def _head(kind: str, model: str) -> Answer:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _reason(caption: Caption) -> str:
    return "stop" if caption.finished else "length"


def _base64(z: Tensor) -> str:
    return base64.b64encode(z.numpy().astype(np.dtype("<f4")).tobytes()).decode("ascii")


def png(image: Image.Image) -> bytes:
    """The bytes of an image's file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
