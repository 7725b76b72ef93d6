"""Experiment 4: what can be answered from the caption alone (paper, section 4.2.3 and Table 3).

A reader that never sees the picture gets the caption and a question. The paper does not give its prompt, how its examples are
picked, how answers are normalised or which of the ten right answers counts; here the examples are questions about other pictures
of the run with their captions by the same source, and the official VQAv2 accuracy stands beside the exact match.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vlv.endpoint import Answer, ChatRequest, Client, user
from vlv.errors import ConfigError, DataError, ModelFolderError
from vlv.evaluation.experiments.reconstruction import captions_of, sources_of
from vlv.evaluation.experiments.run import Emit, Key, Report, Run, add, batches, fill
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores
from vlv.evaluation.experiments.sources import ask_all, parse_sources
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
    """One question about one picture."""

    id: str
    sample: str
    question: str
    answers: tuple[str, ...]
    """Of all annotators."""
    kind: str


def settings(
    sources: Sequence[str], questions: str | None = None, annotations: str | None = None
) -> dict[str, Any]:
    """What the predictions depend on beside the data.

    Raises:
        ConfigError: A source makes no sense, or one of the two files is missing.
    """
    if (questions is None) != (annotations is None):
        raise ConfigError("questions and annotations are two files that belong together; name both")
    named = parse_sources(sources)
    if any(source.kind == "z" for source in named):
        raise ConfigError("questions are answered from captions; a source z writes none")
    return {
        "sources": {source.name: str(source) for source in named},
        "questions": questions,
        "annotations": annotations,
    }


# --- questions -----------------------------------------------------------------------------------------


def questions_of(run: Run) -> list[Question]:
    """All questions of a run, in a fixed order.

    Raises:
        DataError: The files have another form, or belong to other pictures.
    """
    samples = run.data.samples()
    if run.settings["questions"] is not None:
        files = Path(run.settings["questions"]), Path(run.settings["annotations"])
        return read_vqa(*files, samples)
    if samples[0].scene is None:
        raise ConfigError("for pictures of your own name --questions and --annotations")
    return [question for sample in samples for question in _about(sample, run.data.seed)]


def _about(sample: Sample, seed: int) -> Iterator[Question]:
    assert sample.scene is not None, "checked by questions_of"
    rng = np.random.default_rng([seed, sample.seed % 2**32, 3])
    for asked in ask(sample.scene, rng):
        id = f"{sample.id}/{asked.kind}"
        answer = normalise_answer(asked.answer)  # numbers as digits, as annotators write them
        yield Question(id, sample.id, asked.question, (answer,) * ANNOTATORS, asked.kind)


def read_vqa(questions: Path, annotations: Path, samples: Sequence[Sample]) -> list[Question]:
    """Read the official files of VQAv2 and OK-VQA; questions about other pictures are left out.

    Raises:
        DataError: A file cannot be read or has another form, or none of its pictures is a sample.
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
            f"none of the questions in {questions} is about a picture of the run; their names must end in COCO's image id, "
            f"and the first is {samples[0].id}"
        )
    return found


# --- readers -------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Answers questions from text."""

    def answer(self, prompts: Iterator[tuple[Row, str, str, Question]], emit: Emit) -> None:
        """Hand on a row with ``answer`` or ``error`` for each (key, prompt, caption, question)."""
        ...


def clean(text: str) -> str:
    """The answer in a model's words: its first line, without a label before it.

    >>> clean("Answer: Two dogs.")
    'Two dogs.'
    """
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.sub(r"^(?:answer|a)\s*:\s*", "", first, flags=re.IGNORECASE)


class EndpointReader:
    """A language model behind an address."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def answer(self, prompts: Iterator[tuple[Row, str, str, Question]], emit: Emit) -> None:
        """Many at a time, in any order."""
        requests = (
            (key, ChatRequest([user(prompt)], max_tokens=MAX_ANSWER_TOKENS, temperature=0.0))
            for key, prompt, _, _ in prompts
        )

        def read(answer: Answer) -> Row:
            return {"answer": clean(answer.text)}

        ask_all(self._client, requests, read, emit)


class LocalReader:
    """A causal language model of transformers, greedy.

    Raises:
        ModelFolderError: There is none of that name.
    """

    def __init__(self, name: str, device: torch.device, batch_size: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                name, padding_side="left", trust_remote_code=False
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelFolderError(
                f"{name} is no language model of transformers ({error})"
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = loaded.to(device).eval()
        self._device, self._batch_size = device, batch_size

    @torch.no_grad()
    def answer(self, prompts: Iterator[tuple[Row, str, str, Question]], emit: Emit) -> None:
        """Batch by batch."""
        for batch in batches(list(prompts), self._batch_size):
            texts = [self._dialogue(prompt) for _, prompt, _, _ in batch]
            inputs = self._tokenizer(texts, return_tensors="pt", padding=True).to(self._device)
            ids = self._model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )[:, inputs.input_ids.shape[1] :]
            written = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            emit(
                [
                    {**key, "answer": clean(text)}
                    for (key, *_), text in zip(batch, written, strict=True)
                ]
            )

    def _dialogue(self, prompt: str) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            return prompt
        turn = [{"role": "user", "content": prompt}]
        return str(
            self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        )


class ToyReader:
    """Reads a caption of the toy world with the parser; it says "unknown" where the caption does not tell.

    It needs no examples and makes no mistakes of its own: what it gets wrong the caption got wrong, or left out.
    """

    def answer(self, prompts: Iterator[tuple[Row, str, str, Question]], emit: Emit) -> None:
        """All at once."""
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
        (r"what kind of picture is it\?", lambda claims: claims.scene.get("style", UNKNOWN)),
        (r"what colour is the (\w+)\?", lambda c, shape: _fact(c, "shape", shape, "colour")),
        (r"what is the surface of the (\w+) like\?", lambda c, shape: _fact(c, "shape", shape, "material")),
        (r"what shape is the object on the (\w+)\?", lambda c, column: _fact(c, "column", column, "shape")),
        (r"is the (\w+) to the left or to the right of the (\w+)\?", _side),
    ]  # fmt: skip
    for pattern, answer in patterns:
        if match := re.fullmatch(pattern, question):
            return answer(claims, *match.groups())
    return UNKNOWN


def _exists(claims: Claims, colour: str | None, shape: str) -> str:
    stated = [o for o in claims.objects if o.get("shape") == shape]
    return "yes" if any(colour in (None, o.get("colour")) for o in stated) else "no"


def _count(claims: Claims) -> str:
    number = len(claims.objects)
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


def judge(
    run: Run,
    name: str,
    load: Callable[[], Reader],
    about: dict[str, Any],
    shots: int,
    report: Report = lambda rows: None,
) -> Tally:
    """Let a reader answer the questions that it has not answered.

    Args:
        run: With captions.
        name: Of the reader; its table is ``judgements/NAME.jsonl``.
        load: Loads it.
        about: What its answers depend on.
        shots: Examples before each question.
        report: Receives finished rows.
    """
    run.check(NAME)
    if shots < 0:
        raise ConfigError(f"shots is {shots}; it must be 0 or more")
    questions, total = questions_of(run), Tally()
    known = {question.id: question for question in questions}
    with run.filling(f"judgements/{name}", ANSWER_KEY, {**about, "shots": shots}) as table:
        for source in sources_of(run):
            captions = {
                id: str(row["caption"]) for id, row in captions_of(run, source.name).items()
            }
            if not captions:
                raise DataError(
                    f"{run.folder} has no captions of {source.name} yet; begin with vlv eval predict"
                )
            usable = [q for q in questions if q.sample in captions]

            def prompts(
                missing: Sequence[Key],
                captions: dict[str, str] = captions,
                usable: Sequence[Question] = usable,
            ) -> Iterator[tuple[Row, str, str, Question]]:
                for id, source_name in missing:
                    question = known[id]
                    examples = pick_shots(question, usable, shots, run.data.seed)
                    key = {"question_id": id, "source": source_name}
                    yield (
                        key,
                        make_prompt(question, examples, captions),
                        captions[question.sample],
                        question,
                    )

            def make(missing: list[Key], emit: Emit, prompts: Any = prompts) -> None:
                load().answer(prompts(missing), emit)

            wanted = [(question.id, source.name) for question in usable]
            total = add(total, fill(table, wanted, make, report))
    return total


def pick_shots(
    question: Question, questions: Sequence[Question], shots: int, seed: int
) -> list[Question]:
    """Examples for a question: drawn from those about other pictures, the same whoever asks."""
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
            f"{shots} examples are more than the questions about other pictures; ask for fewer shots, or take more pictures"
        )
    return list(chosen.values())


def make_prompt(question: Question, examples: Sequence[Question], captions: dict[str, str]) -> str:
    """Instruction, examples with their most frequent answer, and the question."""
    blocks = [INSTRUCTION]
    for example in examples:
        answer = max(example.answers, key=example.answers.count)
        blocks.append(_block(captions[example.sample], example.question, f" {answer}"))
    return "\n\n".join([*blocks, _block(captions[question.sample], question.question, "")])


def _block(caption: str, question: str, answer: str) -> str:
    return f"Description: {caption}\nQuestion: {question}\nAnswer:{answer}"


# --- score ---------------------------------------------------------------------------------------------


def score(run: Run) -> Scores:
    """Accuracy of every source by every reader; intervals over pictures, of which each has several questions."""
    run.check(NAME)
    scores = Scores()
    questions = {question.id: question for question in questions_of(run)}
    for name in run.judges(""):
        about = run.table_settings(f"judgements/{name}")
        scores.settings[f"reader {name}"] = about
        everything = run.all_rows(f"judgements/{name}", ANSWER_KEY)
        rows = [row for row in everything if row.get("error") is None]
        if len(rows) < len(everything):
            scores.notes.append(
                f"{name}: {len(everything) - len(rows)} of {len(everything)} answers failed"
            )
        if usd := sum(row.get("usd") or 0.0 for row in everything):
            scores.settings[f"cost of {name} in USD"] = usd
        for source in sources_of(run):
            answers = [row for row in rows if row["source"] == source.name]
            _measure(
                scores, f"{source.name}.{name}", f"{source.name} read by {name}", answers, questions
            )
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
