"""``vlv data caption``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from vlv.cli import common
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.data.records import Record
    from vlv.endpoint import Ledger
    from vlv.jobs.teacher.job import Teacher, TeacherJob
    from vlv.jobs.teacher.local import BatchModel
    from vlv.jobs.teacher.outputs import Form
    from vlv.jobs.teacher.remote import EndpointTeacher

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the captions; created.")]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint", help="OpenAI-compatible address, before /chat/completions."),
]
VLM = Annotated[
    str | None,
    typer.Option("--vlm", help="Instead: a vision-language model of transformers, folder or id."),
]
ModelName = Annotated[
    str, typer.Option("--model", "-m", help="The endpoint's model; without one, a model of vlv.")
]
KeyEnv = Annotated[
    str | None, typer.Option(help="Environment variable that holds the endpoint's key.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="exhaustive, short, tags, @FILE, or the text, with {alt}, {tags}, {field|default}. Repeatable.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Longest answer, in the teacher's tokens; 512, or what a vlv model allows."
    ),
]
Temperature = Annotated[float | None, typer.Option(min=0, help="Of the draws.")]
Tries = Annotated[int, typer.Option(min=1, help="How often to ask before an answer has failed.")]
Language = Annotated[str, typer.Option(help="en, de, fr, es, it, pt, nl, or any.")]
MinWords = Annotated[int, typer.Option(min=1, help="Fewest words of a caption.")]
MaxWords = Annotated[int | None, typer.Option(help="Most words of a caption.")]
MaxSide = Annotated[int, typer.Option(help="Images are sent with at most this many pixels a side.")]
Quality = Annotated[int, typer.Option(help="JPEG quality of the images that are sent.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight at the same time.")]
PerMinute = Annotated[float | None, typer.Option(help="Most requests a minute.")]
TokensPerMinute = Annotated[float | None, typer.Option(help="Most tokens a minute.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="More of the endpoint: timeout=60, retries=3, 'extra={reasoning_effort: none}'.",
    ),
]
PriceIn = Annotated[float, typer.Option(help="USD for a million tokens of prompts.")]
PriceOut = Annotated[float, typer.Option(help="USD for a million tokens of answers.")]
MaxRequests = Annotated[int | None, typer.Option(help="Budget in requests, over all runs.")]
MaxTotalTokens = Annotated[int | None, typer.Option(help="Budget in tokens, over all runs.")]
MaxUSD = Annotated[float | None, typer.Option(help="Budget in USD, over all runs.")]
Forms = Annotated[
    list[str] | None,
    typer.Option("--form", help="parquet, jsonl, txt, webdataset, imagefolder. Repeatable."),
]
Images = Annotated[
    Literal["bytes", "path"], typer.Option(help="What the Parquet column image holds.")
]
ShardSize = Annotated[int, typer.Option(min=1, help="Images of a Parquet shard.")]
OnExisting = Annotated[
    Literal["skip", "overwrite", "error"],
    typer.Option(help="What to do with captions that are there; paid answers are kept."),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Ask again about what has failed.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the first prompt and the cost; send nothing.")
]


def caption(
    context: typer.Context,
    inputs: common.Inputs,
    output: Output,
    endpoint: EndpointUrl = None,
    vlm: VLM = None,
    model: ModelName = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    key_env: KeyEnv = None,
    prompt: Prompts = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    tries: Tries = 2,
    language: Language = "en",
    min_words: MinWords = 1,
    max_words: MaxWords = None,
    max_side: MaxSide = 1024,
    jpeg_quality: Quality = 90,
    concurrency: Concurrency = 16,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    settings: Set = None,
    price_in: PriceIn = 0.0,
    price_out: PriceOut = 0.0,
    max_requests: MaxRequests = None,
    max_total_tokens: MaxTotalTokens = None,
    max_usd: MaxUSD = None,
    form: Forms = None,
    images: Images = "bytes",
    shard_size: ShardSize = 2000,
    on_existing: OnExisting = "skip",
    retry_failed: RetryFailed = False,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
    batch_size: common.BatchSize = 8,
    recursive: common.Recursive = True,
    limit: common.Limit = None,
    image_column: common.ImageColumn = None,
    caption_column: common.CaptionColumn = None,
    dry_run: DryRun = False,
    seed: common.Seed = 0,
) -> int:
    """Let a teacher caption images: an endpoint, a model of transformers, or a model of vlv.

    Writes Parquet shards (image, caption, ...) that stage 2 reads. An interrupted run goes on where it
    stopped when the same command is given again, and no answer is paid for twice.
    """
    records = common.find_inputs(inputs, recursive, limit, image_column, caption_column)
    job = _job(context.params, records)
    return _show(job) if dry_run else _run(job, output)


def _job(given: dict[str, Any], records: list[Record]) -> TeacherJob:
    """The job that the options describe."""
    from vlv.jobs.teacher.checks import Wanted
    from vlv.jobs.teacher.job import Asking, TeacherJob
    from vlv.jobs.teacher.prompts import Prompt, read_prompts

    wanted = Wanted(given["language"], given["min_words"], given["max_words"])
    texts = given["prompt"] or []
    if given["endpoint"] is not None:
        teacher: Teacher = _remote(given)
    else:
        _refuse(given, _ENDPOINT_ONLY, "--endpoint")
        teacher = _local(given)
    takes_prompts = given["endpoint"] is not None or given["vlm"] is not None
    longest = given["max_tokens"] or (512 if takes_prompts else None)
    drawing = (longest, given["temperature"], given["seed"], given["tries"])
    if texts and not takes_prompts:
        raise ConfigError(
            "--prompt has no effect on a model of vlv; name --endpoint or --vlm, or leave it out"
        )
    prompts = read_prompts(texts or ["exhaustive"]) if takes_prompts else [Prompt("vlv", "-")]
    return TeacherJob(
        records,
        prompts,
        Asking(*drawing, wanted),
        teacher,
        Path(given["output"]),
        forms=_forms(given["form"]),
        images=given["images"],
        shard_size=given["shard_size"],
        on_existing=given["on_existing"],
        retry_failed=given["retry_failed"],
    )


_ENDPOINT_ONLY = (
    "key_env",
    "requests_per_minute",
    "tokens_per_minute",
    "settings",
    "max_requests",
    "max_total_tokens",
    "max_usd",
)


def _refuse(given: dict[str, Any], names: Sequence[str], needed: str) -> None:
    """Options that would have no effect are errors."""
    for name in names:
        if given[name]:
            option = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} has no effect without {needed}")


def _forms(given: list[str] | None) -> list[Form]:
    from vlv.jobs.teacher.outputs import FORMS

    if unknown := sorted({*(given or ())} - {*FORMS}):
        raise ConfigError(f"there is no form {unknown[0]!r}; choose among {', '.join(FORMS)}")
    return [cast("Form", name) for name in FORMS if name in (given or ["parquet"])]


def _remote(given: dict[str, Any]) -> EndpointTeacher:
    from vlv.endpoint import Budget, Endpoint, Prices
    from vlv.jobs.teacher.remote import EndpointTeacher
    from vlv.jobs.teacher.sending import Shrink

    if given["vlm"] is not None:
        raise ConfigError("--endpoint and --vlm name two teachers; leave one out")
    if given["model"] == common.SHIPPED_MODEL:
        raise ConfigError("name the endpoint's model with --model")
    _refuse(given, ("revision",), "--vlm or a model of vlv")
    options = ("key_env", "concurrency", "requests_per_minute", "tokens_per_minute")
    endpoint = Endpoint(
        given["endpoint"],
        given["model"],
        **{name: given[name] for name in options},
        **_more(given["settings"] or []),
    )
    return EndpointTeacher(
        endpoint,
        Shrink(given["max_side"], given["jpeg_quality"]),
        Budget(given["max_requests"], given["max_total_tokens"], given["max_usd"]),
        Prices(given["price_in"], given["price_out"]),
        given["seed"],
    )


_MORE = {
    "connect_timeout": float,
    "timeout": float,
    "retries": int,
    "backoff": float,
    "max_backoff": float,
    "patience": float,
    "failures_in_a_row": int,
    "token_field": str,
    "extra": dict,
}


def _more(changes: Sequence[str]) -> dict[str, Any]:
    """Further settings of the endpoint, from NAME=VALUE."""
    import yaml

    values: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in _MORE:
            raise ConfigError(f"--set {change}: name one of {', '.join(_MORE)}, as in timeout=60")
        try:
            values[name] = _MORE[name](yaml.safe_load(text))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"--set {change}: this is no {_MORE[name].__name__}") from error
    return values


def _local(given: dict[str, Any]) -> Teacher:
    from vlv.jobs.teacher.local import LocalTeacher, TransformersModel, VLVModel

    where = common.placement(given["device"], given["dtype"])
    name, revision = given["vlm"] or given["model"], given["revision"]

    def load() -> BatchModel:
        if given["vlm"] is not None:
            return TransformersModel(name, revision, where.device, where.dtype)
        pipe = common.load_pipeline(name, ["caption"], revision=revision, placement=where)
        return VLVModel(pipe, name)

    return LocalTeacher(name, load, given["batch_size"], {"revision": revision})


def _show(job: TeacherJob) -> int:
    """Print the first prompt and what the job may cost."""
    from vlv.jobs.teacher.remote import EndpointTeacher

    for prompt in job.prompts:
        typer.echo(f"[{prompt.name}]\n{prompt.render(job.records[0])}\n")
    common.say(f"dry run: {len(job.records)} images, {len(job.prompts)} prompts; nothing is sent")
    if isinstance(job.teacher, EndpointTeacher):
        tokens, usd = job.teacher.estimate(job, len(job.records))
        common.say(f"at most about {tokens} tokens, {usd:.2f} USD, if no second try is needed")
    return 0


def _run(job: TeacherJob, output: Path) -> int:
    with _Bar(job) as bar:
        tally = job.run(bar.report, bar.skip)
    code = common.close(tally, output)
    if bar.ledger is not None:
        common.say(_account(bar.ledger))
    if job.left is not None:
        common.say(
            f"{job.left}; {job.num_left()} images are left, and the same command with a larger budget "
            "goes on"
        )
        return 2
    return code


def _account(ledger: Ledger) -> str:
    spent, before = ledger.spent, ledger.before
    return (
        f"{spent.requests} requests, {spent.cached} answers known before, "
        f"{spent.prompt_tokens} + {spent.completion_tokens} tokens, {spent.usd:.4f} USD"
        + (f" ({before.usd + spent.usd:.4f} USD over all runs)" if before.answers else "")
    )


class _Bar(common.Progress):
    """The bar, with what is spent so far."""

    def __init__(self, job: TeacherJob) -> None:
        from vlv.jobs.teacher.remote import EndpointTeacher

        super().__init__(len(job.records))
        self.ledger: Ledger | None = None
        if isinstance(job.teacher, EndpointTeacher):
            job.teacher.on_spent = self._on_spent

    def _on_spent(self, ledger: Ledger) -> None:
        self.ledger = ledger
        usd = ledger.before.usd + ledger.spent.usd
        self.postfix(f"{usd:.4f} USD" if usd else f"{ledger.spent.tokens} tokens")

    def report(self, error: str | None) -> None:  # type: ignore[override]
        super().report([error])
