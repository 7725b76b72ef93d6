"""Teachers on this machine: a vision-language model of transformers, or a model of vlv."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlv.endpoint import Answer
from vlv.errors import ModelFolderError
from vlv.jobs.inputs import open_record
from vlv.models.placement import pick_device, pick_dtype
from vlv.storage import Json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from vlv.jobs.teacher.job import Asking, Item, Question, TeacherJob
    from vlv.models.pipeline import VLVPipeline


BatchModel = Callable[["Sequence[Image.Image]", "Sequence[str]", "Asking", int], list[Answer]]
"""A loaded model: from images, prompts, how it is asked and the number of the try to one answer per image."""


class LocalTeacher:
    """Asks a model in this process, batch by batch, in order.

    Args:
        name: Of the model, for the column ``model``.
        load: Loads it; called only when there is something to do.
        batch_size: Images worked on together.
        about: What the captions depend on, besides the name.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], BatchModel],
        batch_size: int,
        about: dict[str, object] | None = None,
    ) -> None:
        self.name, self._load, self._batch_size = name, load, batch_size
        self._about = about or {}

    def settings(self) -> dict[str, object]:
        """What the captions depend on."""
        return {"model": self.name, **self._about}

    def run(self, job: TeacherJob, items: Iterator[Item]) -> None:
        """Ask about all items, in order."""
        model: BatchModel | None = None
        while batch := list(islice(items, self._batch_size)):
            model = model or self._load()
            opened = [open_record(item.record) for item in batch]
            for prompt in job.prompts:
                asked = [
                    job.ask(item, prompt, found)
                    for item, found in zip(batch, opened, strict=True)
                    if prompt in item.prompts
                ]
                _ask(model, job, [question for question in asked if question is not None])
            for item in batch:
                if write := job.finish(item):
                    write()


def _ask(model: BatchModel, job: TeacherJob, waiting: list[Question]) -> None:
    """Write the rows of a batch for one prompt; answers that are no captions are asked for again."""
    while waiting:
        images = [q.opened.image for q in waiting if q.opened.image is not None]
        texts = [job.asking.text(question) for question in waiting]
        attempt = min(question.tries for question in waiting)
        answers = model(images, texts, job.asking, attempt)
        waiting = [q for q, answer in zip(waiting, answers, strict=True) if job.take(q, answer)]


def vlv_model(pipe: VLVPipeline, name: str) -> BatchModel:
    """A model of vlv; it takes no prompt."""

    def answer(
        images: Sequence[Image.Image], texts: Sequence[str], asking: Asking, attempt: int
    ) -> list[Answer]:
        del texts
        temperature, seed = asking.draw(attempt)
        options: Json = {}
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "seed": seed}
        captions = pipe.describe(
            list(images), batch_size=len(images), max_new_tokens=asking.max_tokens, **options
        )
        return [
            Answer(c.text, "stop" if c.finished else "length", name, 0, c.num_tokens)
            for c in captions
        ]

    return answer


class TransformersModel:
    """An image-text-to-text model of transformers: a folder or an id on the hub, without remote code.

    Args:
        model: Folder or id.
        revision: On the hub.
        device: See `pick_device`.
        dtype: See `pick_dtype`.

    Raises:
        ModelFolderError: It cannot be loaded as such a model.
    """

    def __init__(
        self, model: str, revision: str | None = None, device: str = "auto", dtype: str = "auto"
    ) -> None:
        where = pick_device(device)
        try:
            self._processor = AutoProcessor.from_pretrained(
                model, revision=revision, trust_remote_code=False
            )
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model,
                revision=revision,
                dtype=pick_dtype(dtype, where),
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ModelFolderError(
                f"{model} cannot be loaded as a vision-language model of transformers ({reason})"
            ) from error
        tokenizer = getattr(self._processor, "tokenizer", None)
        if tokenizer is None:
            raise ModelFolderError(f"{model} has a processor without a tokenizer")
        tokenizer.padding_side = "left"  # captions begin where the prompts end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer, self._name = tokenizer, model
        self._model = loaded.to(where).eval()

    def answer(
        self, images: Sequence[Image.Image], texts: Sequence[str], asking: Asking, attempt: int
    ) -> list[Answer]:
        """Answers of a batch; sampled ones depend on the whole batch."""
        inputs = self._processor(
            text=[self._prompt(text) for text in texts],
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        temperature, seed = asking.draw(attempt)
        options: Json = {"do_sample": bool(temperature)}
        if temperature:
            options["temperature"] = temperature
        device = self._model.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=bool(temperature)):
            if temperature:
                torch.manual_seed(seed or 0)
            ids = self._model.generate(
                **inputs,
                max_new_tokens=asking.max_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                **options,
            )
        width = 0 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        lengths = inputs["attention_mask"].sum(1).tolist()
        pairs = zip(ids[:, width:].tolist(), lengths, strict=True)
        return [self._read(row, int(length)) for row, length in pairs]

    def _prompt(self, text: str) -> str:
        if token := getattr(self._processor, "image_token", None):
            text = text.replace(str(token), "")  # a field of a record may hold anything
        if not getattr(self._processor, "chat_template", None):
            return text  # such as Florence-2, which knows no chat
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(turn, add_generation_prompt=True))

    def _read(self, row: list[int], prompt_tokens: int) -> Answer:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        first = next((n for n, token in enumerate(row[1:], start=1) if token in ends), None)
        first = 0 if row and row[0] in ends and not self._model.config.is_encoder_decoder else first
        tokens = row if first is None else row[:first]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        reason = "length" if first is None else "stop"
        return Answer(str(text), reason, self._name, prompt_tokens, len(tokens))
