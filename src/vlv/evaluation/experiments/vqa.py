"""Experiment 4: what can be answered from the caption alone (paper, section 4.2.3 and Table 3).

A reader that never sees the image gets the caption and a question. The paper does not give its prompt, how its examples are
picked, how answers are normalised or which of the ten right answers counts; here the examples are questions about other images
of the run with their captions by the same source, and the official VQAv2 accuracy stands beside the exact match.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlv.endpoint import ChatRequest, Client, user
from vlv.errors import ConfigError, DataError, ModelFolderError
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.run import Emit, Judge, Key, Report, Run, Settings, batches, silent
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores, judgements
from vlv.evaluation.experiments.sources import ask_all, captions_only
from vlv.evaluation.experiments.viewing import sources_of, texts_of
from vlv.evaluation.metrics.answers import exact_match, normalise_answer, vqa_accuracy
from vlv.evaluation.results import Table
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally
from vlv.toyworld.language import Claims, parse
from vlv.toyworld.questions import ask
from vlv.toyworld.scene import COLUMNS

NAME = "vqa"
TITLE = "Questions answered from captions alone"
ANSWER_KEY = ("question_id", "source")
MAX_ANSWER_TOKENS = 16
ANNOTATORS = 10

INSTRUCTION = (
    "You cannot see the picture; answer from its description alone. Give the answer only, in one to three words, in lower case, "
    'numbers as digits, and "yes" or "no" where that is asked. Guess where the description does not say.'
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image."""

    id: str
    sample: str
    question: str
    answers: tuple[str, ...]
    """Of all annotators."""
    kind: str


def settings(
    sources: Sequence[str], questions: str | None = None, annotations: str | None = None
) -> Settings:
    """What the predictions depend on beside the data.

    Raises:
        ConfigError: A source makes no sense, or one of the two files is missing.
    """
    if (questions is None) != (annotations is None):
        raise ConfigError("questions and annotations are two files that belong together; name both")
    return {
        "sources": captions_only(sources),
        "questions": questions,
        "annotations": annotations,
    }


predict = predict_captions


# --- questions -----------------------------------------------------------------------------------------


def questions_of(run: Run) -> list[Question]:
    """All questions of a run, in a fixed order.

    Raises:
        DataError: The files have another form, or belong to other images.
    """
    samples = run.data.samples()
    if run.settings["questions"] is not None:
        files = Path(run.settings["questions"]), Path(run.settings["annotations"])
        return read_vqa(*files, samples)
    if samples[0].scene is None:
        raise ConfigError("for images of your own name --questions and --annotations")
    return [question for sample in samples for question in _about(sample, run.data.seed)]


def _about(sample: Sample, seed: int) -> Iterator[Question]:
    rng = np.random.default_rng([seed, sample.seed % 2**32, 3])
    for asked in ask(sample.known_scene, rng):
        id = f"{sample.id}/{asked.kind}"
        answer = normalise_answer(asked.answer)  # numbers as digits, as annotators write them
        yield Question(id, sample.id, asked.question, (answer,) * ANNOTATORS, asked.kind)


def read_vqa(questions: Path, annotations: Path, samples: Sequence[Sample]) -> list[Question]:
    """Read the official files of VQAv2 and OK-VQA; questions about other images are left out.

    Raises:
        DataError: A file cannot be read or has another form, or none of its images is a sample.
    """
    by_number = {}
    for sample in samples:
        if digits := re.search(r"(\d+)$", Path(sample.id).stem):
            by_number[int(digits.group())] = sample.id
    try:
        asked = json.loads(questions.read_text("utf-8"))["questions"]
        answered = {
            row["question_id"]: row
            for row in json.loads(annotations.read_text("utf-8"))["annotations"]
        }
        found = [
            Question(
                str(row["question_id"]),
                by_number[int(row["image_id"])],
                str(row["question"]),
                tuple(str(one["answer"]) for one in answered[row["question_id"]]["answers"]),
                str(answered[row["question_id"]].get("answer_type", "other")),
            )
            for row in asked
            if int(row["image_id"]) in by_number
        ]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{questions} and {annotations} are no pair of VQA files ({type(error).__name__}: {error}); take the official "
            "questions and annotations of one split"
        ) from error
    if not found:
        raise DataError(
            f"none of the questions in {questions} is about an image of the run; their names must end in COCO's image id, "
            f"and the first is {samples[0].id}"
        )
    return found


# --- readers -------------------------------------------------------------------------------------------


Prompt = tuple[Row, str, str, Question]
"""The key of a row, the prompt, the caption and the question."""
Reader = Callable[[Iterator[Prompt], Emit], None]
"""Answers questions from text: hands on a row with ``answer`` or ``error`` for each prompt."""


def clean(text: str) -> str:
    """The answer in a model's words: its first line, without a label before it.

    >>> clean("Answer: Two dogs.")
    'Two dogs.'
    """
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.sub(r"^(?:answer|a)\s*:\s*", "", first, flags=re.IGNORECASE)


def endpoint_reader(client: Client) -> Reader:
    """A language model behind an address, asked many questions at a time."""

    def answer(prompts: Iterator[Prompt], emit: Emit) -> None:
        requests = (
            (key, ChatRequest([user(prompt)], max_tokens=MAX_ANSWER_TOKENS, temperature=0.0))
            for key, prompt, _, _ in prompts
        )
        ask_all(client, requests, lambda found: {"answer": clean(found.text)}, emit)

    return answer


def local_reader(name: str, device: torch.device, batch_size: int) -> Reader:
    """A causal language model of transformers, greedy, batch by batch.

    Raises:
        ModelFolderError: There is none of that name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, padding_side="left", trust_remote_code=False
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{name} is no language model of transformers ({error})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = loaded.to(device).eval()
    chats = getattr(tokenizer, "chat_template", None) is not None

    def dialogue(prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        if not chats:
            return prompt
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    @torch.no_grad()
    def answer(prompts: Iterator[Prompt], emit: Emit) -> None:
        for batch in batches(list(prompts), batch_size):
            texts = [dialogue(prompt) for _, prompt, _, _ in batch]
            inputs = tokenizer(texts, return_tensors="pt", padding=True).to(device)
            ids = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs.input_ids.shape[1] :]
            written = tokenizer.batch_decode(ids, skip_special_tokens=True)
            keys = [key for key, *_ in batch]
            emit([{**k, "answer": clean(text)} for k, text in zip(keys, written, strict=True)])

    return answer


def toy_reader(prompts: Iterator[Prompt], emit: Emit) -> None:
    """Read a caption of the toy world with the parser; it says "unknown" where the caption does not tell.

    It needs no examples and makes no mistakes of its own: what it gets wrong the caption got wrong, or left out.
    """
    emit(
        [
            {**key, "answer": answer_from_claims(question.question, parse(caption))}
            for key, _, caption, question in prompts
        ]
    )


UNKNOWN = "unknown"
_NUMBERS = ("zero", "one", "two", "three")


def answer_from_claims(question: str, claims: Claims) -> str:
    """Answer a question of `vlv.toyworld.questions` from what a caption claims."""
    patterns: list[tuple[str, Callable[..., str]]] = [
        (r"is there an? (?:(\w+) )?(\w+)\?", _exists),
        (r"how many objects are there\?", _count),
        (r"how many (\w+)s are there\?", _count),
        (r"is anything (\w+)\?", _anything),
        (r"what kind of picture is it\?", lambda claims: claims.scene.get("style", UNKNOWN)),
        (r"what colour is the (\w+)\?", lambda c, shape: _fact(c, "shape", shape, "colour")),
        (r"what is the surface of the (\w+) like\?", lambda c, shape: _fact(c, "shape", shape, "material")),
        (r"what shape is the object on the (\w+)\?", lambda c, column: _fact(c, "column", column, "shape")),
        (r"is the (\w+) to the left or to the right of the (\w+)\?", _side),
        (r"is the (\w+) (left|right|in front)? ?(?:of|behind) the (\w+)\?", _stands),
    ]  # fmt: skip
    for pattern, answer in patterns:
        if match := re.fullmatch(pattern, question):
            return answer(claims, *match.groups())
    return UNKNOWN


def _exists(claims: Claims, colour: str | None, shape: str) -> str:
    stated = [o for o in claims.objects if o.get("shape") == shape]
    return "yes" if any(colour in (None, o.get("colour")) for o in stated) else "no"


def _anything(claims: Claims, colour: str) -> str:
    return "yes" if any(o.get("colour") == colour for o in claims.objects) else "no"


def _stands(claims: Claims, first: str, side: str | None, second: str) -> str:
    """Whether the first shape is on a side of the second; no side is behind."""
    if side in ("left", "right"):
        found = _side(claims, first, second)
        return found if found == UNKNOWN else ("no", "yes")[found == side]
    rows = tuple(_fact(claims, "shape", shape, "row") for shape in (first, second))
    if UNKNOWN in rows:
        return UNKNOWN
    return "yes" if rows == (("front", "back") if side else ("back", "front")) else "no"


def _count(claims: Claims, shape: str | None = None) -> str:
    number = len([o for o in claims.objects if shape in (None, o.get("shape"))])
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


def _fact(claims: Claims, where: str, value: str, wanted: str) -> str:
    found = [o for o in claims.objects if o.get(where) == value]
    return found[0].get(wanted, UNKNOWN) if found else UNKNOWN


def _side(claims: Claims, first: str, second: str) -> str:
    columns = [_fact(claims, "shape", shape, "column") for shape in (first, second)]
    if UNKNOWN not in columns and columns[0] != columns[1]:
        a, b = (COLUMNS.index(column) for column in columns)
        return "left" if a < b else "right"
    for a_shape, relation, b_shape in claims.relations:
        if relation in ("left", "right"):
            if (a_shape.split()[-1], b_shape) == (first, second):
                return relation
            if (b_shape, a_shape.split()[-1]) == (first, second):
                return "right" if relation == "left" else "left"
    return UNKNOWN


# --- judge ---------------------------------------------------------------------------------------------


def judge(run: Run, judge: Judge, backends: Backends, report: Report = silent) -> Tally:
    """Let a reader answer the questions that it has not answered.

    Raises:
        ConfigError: It is no reader.
    """
    run.check(NAME)
    load = _reader(judge, backends)
    questions, texts = questions_of(run), texts_of(run)
    known = {question.id: question for question in questions}
    usable = {
        name: [question for question in questions if question.sample in captions]
        for name, captions in texts.items()
    }

    def prompts(missing: list[Key]) -> Iterator[Prompt]:
        for id, source in missing:
            question, captions = known[id], texts[source]
            examples = pick_shots(question, usable[source], judge.shots, run.data.seed)
            key: Row = {"question_id": id, "source": source}
            prompt = make_prompt(question, examples, captions)
            yield key, prompt, captions[question.sample], question

    def make(missing: list[Key], emit: Emit) -> None:
        load()(prompts(missing), emit)

    about = {"reader": str(judge), "instruction": INSTRUCTION, "shots": judge.shots}
    wanted = [(question.id, name) for name, asked in usable.items() for question in asked]
    return run.fill(f"judgements/{judge.name}", ANSWER_KEY, about, wanted, make, report)


def _reader(judge: Judge, backends: Backends) -> Callable[[], Reader]:
    """What makes a reader; wrong ones are refused at once, models are loaded when they are needed."""
    value = judge.value
    if judge.kind == "parser" and not value:
        return lambda: toy_reader
    if judge.kind == "endpoint":
        return lambda: endpoint_reader(backends.client(value))
    if judge.kind == "llm" and value:
        return lambda: local_reader(value, backends.device, backends.batch_size)
    raise ConfigError(
        f'"{judge.kind}" is no reader; write parser for the toy world, llm:MODEL, or endpoint:MODEL@URL'
    )


def pick_shots(
    question: Question, questions: Sequence[Question], shots: int, seed: int
) -> list[Question]:
    """Examples for a question: sampled from those about other images, the same for every reader."""
    if not shots:
        return []
    number = int.from_bytes(question.id.encode()[-8:], "big")
    rng = np.random.default_rng([seed, number, 4])
    chosen: dict[int, Question] = {}
    for index in rng.permutation(len(questions))[: 2 * shots + 64].tolist():
        if questions[index].sample != question.sample and len(chosen) < shots:
            chosen[index] = questions[index]
    if len(chosen) < shots:
        raise ConfigError(
            f"{shots} examples are more than the questions about other images; ask for fewer shots, or take more images"
        )
    return list(chosen.values())


def make_prompt(
    question: Question, examples: Sequence[Question], captions: Mapping[str, str]
) -> str:
    """Instruction, examples with their most frequent answer, and the question."""
    blocks = [INSTRUCTION]
    for example in examples:
        answer = max(example.answers, key=example.answers.count)
        blocks.append(_block(captions[example.sample], example.question, f" {answer}"))
    return "\n\n".join([*blocks, _block(captions[question.sample], question.question, "")])


def _block(caption: str, question: str, answer: str) -> str:
    return f"Description: {caption}\nQuestion: {question}\nAnswer:{answer}"


# --- score ---------------------------------------------------------------------------------------------


def score(run: Run, seed: int) -> Scores:
    """Accuracy of every source by every reader; intervals over images, of which each has several questions."""
    del seed  # every figure is one of samples
    run.check(NAME)
    scores = Scores()
    questions = {question.id: question for question in questions_of(run)}
    for name, _, rows in judgements(run, scores):
        for source in sources_of(run):
            answers = [row for row in rows if row["source"] == source.name]
            text = f"{source.name} read by {name}"
            _measure(scores, f"{source.name}.{name}", text, answers, questions)
    return scores


def _measure(
    scores: Scores, key: str, text: str, rows: Sequence[Row], questions: dict[str, Question]
) -> None:
    official: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    exact: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    kinds: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        question = questions.get(row["question_id"])
        if question is None:
            continue
        accuracy = vqa_accuracy(row["answer"], question.answers)
        for table, group, value in (
            (official, question.sample, accuracy),
            (exact, question.sample, float(exact_match(row["answer"], question.answers))),
            (kinds, question.kind, accuracy),
        ):
            table[group][0] += value
            table[group][1] += 1
    scores.add(f"{key}.accuracy", f"{text}: VQAv2 accuracy", official, "ratio")
    scores.add(f"{key}.exact", f"{text}: exact match", exact, "ratio")
    if kinds:
        rows_of = [(kind, int(n), right / n) for kind, (right, n) in sorted(kinds.items())]
        scores.tables.append(
            Table(f"{text}, by kind", ("kind", "questions", "accuracy"), tuple(rows_of))
        )
