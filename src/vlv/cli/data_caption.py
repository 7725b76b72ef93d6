"""``vlv data caption``."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli import common
from vlv.cli.options import changed, option_group, options, takes_options
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from vlv.endpoint import Ledger
    from vlv.jobs.teacher.files import TeacherOutput
    from vlv.jobs.teacher.job import Asking, Teacher, TeacherJob
    from vlv.jobs.teacher.local import BatchModel
    from vlv.jobs.teacher.prompts import Prompt
    from vlv.jobs.teacher.remote import EndpointTeacher
    from vlv.jobs.wording import Wording


@option_group("Teacher")
class TeacherOptions:
    """Who writes the captions."""

    url: Annotated[
        str | None,
        typer.Option("--endpoint", help="OpenAI-compatible address, before /chat/completions."),
    ] = None
    vlm: Annotated[
        str | None,
        typer.Option(help="Instead: a vision-language model of transformers, folder or id."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"The endpoint's model; without one, a model of vlv, {common.SHIPPED_MODEL} by default.",
        ),
    ] = None
    revision: common.Revision = None
    adapter: common.Adapter = None
    device: common.Device = "auto"
    dtype: common.DType = "auto"
    batch_size: common.BatchSize = 8

    @property
    def takes_prompts(self) -> bool:
        """Whether the teacher is asked in words; a model of vlv is not."""
        return self.url is not None or self.vlm is not None


@option_group("Captions")
class AskingOptions:
    """What is asked, and what counts as a caption."""

    prompt: Annotated[
        list[str],
        typer.Option(
            help="exhaustive, short, tags, @FILE, or the text, with {alt}, {tags}, {field|default} (repeatable)."
        ),
    ] = field(default_factory=list)
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer, in the teacher's tokens; 512, or what a vlv model allows.",
        ),
    ] = None
    temperature: Annotated[float | None, typer.Option(min=0, help="Sampling temperature.")] = None
    tries: Annotated[
        int, typer.Option(min=1, help="How often to ask before an answer has failed.")
    ] = 2
    language: Annotated[str, typer.Option(help="en, de, fr, es, it, pt, nl, or any.")] = "en"
    min_words: Annotated[int, typer.Option(min=1, help="Fewest words of a caption.")] = 1
    max_words: Annotated[int | None, typer.Option(help="Most words of a caption.")] = None
    seed: common.Seed = 0

    def asking(self, default_tokens: int | None, wording: Wording) -> Asking:
        """How the teacher is asked."""
        from vlv.jobs.teacher.checks import Wanted
        from vlv.jobs.teacher.job import Asking

        wanted = Wanted(self.language, self.min_words, self.max_words)
        longest = self.max_tokens or default_tokens
        return Asking(longest, self.temperature, self.seed, self.tries, wanted, wording)


@option_group("Output")
class FileOptions:
    """What is written."""

    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the captions; created.")]
    format: Annotated[
        list[str],
        typer.Option(
            help="parquet, jsonl, csv, txt, webdataset, imagefolder, beside-tars (repeatable)."
        ),
    ] = field(default_factory=lambda: ["parquet"])
    images: Annotated[
        Literal["bytes", "path"], typer.Option(help="What the Parquet column image holds.")
    ] = "bytes"
    shard_size: Annotated[int, typer.Option(min=1, help="Images per Parquet shard.")] = 2000
    on_existing: Annotated[
        Literal["skip", "overwrite", "error"],
        typer.Option(help="What to do with captions that exist; paid answers are kept."),
    ] = "skip"
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again about what has failed.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first prompt and the cost; send nothing.")
    ] = False

    def checked(self) -> TeacherOutput:
        """What is written, for the job."""
        from vlv.jobs.teacher.files import FORMATS, TeacherOutput

        if unknown := sorted({*self.format} - {*FORMATS}):
            raise ConfigError(
                f"there is no format {unknown[0]!r}; choose among {', '.join(FORMATS)}"
            )
        return TeacherOutput(
            self.output,
            [name for name in FORMATS if name in self.format],
            self.images,
            self.shard_size,
            self.on_existing,
            self.retry_failed,
        )


@option_group("Images sent to an endpoint")
class ShrinkOptions:
    """How images are made smaller before they are sent."""

    max_side: Annotated[int, typer.Option(help="Most pixels a side.")] = 1024
    jpeg_quality: Annotated[int, typer.Option(help="JPEG quality.")] = 90


@options
class TeacherCaptionOptions:
    """Options of ``vlv data caption``."""

    source: common.InputOptions
    caption_column: common.CaptionColumn = None
    to: FileOptions
    teacher: TeacherOptions
    ask: AskingOptions
    wording: common.WordingOptions
    endpoint: common.EndpointOptions
    shrink: ShrinkOptions


@takes_options
def caption(given: TeacherCaptionOptions) -> int:
    """Let a teacher caption images: an endpoint, a model of transformers, or a model of vlv.

    Writes Parquet shards (image, caption, ...) that stage 2 reads. An interrupted run goes on where it
    stopped when the same command is given again, and no answer is paid for twice.
    """
    job = _job(given)
    return _show(job) if given.to.dry_run else _run(job, given.to.output)


def _job(given: TeacherCaptionOptions) -> TeacherJob:
    """The job that the options describe."""
    from vlv.jobs.teacher.job import TeacherJob

    default_tokens = 512 if given.teacher.takes_prompts else None
    return TeacherJob(
        given.source.find(given.caption_column, detail="texts"),
        _prompts(given),
        given.ask.asking(default_tokens, given.wording.wording()),
        _local(given.teacher, given.endpoint) if given.teacher.url is None else _remote(given),
        given.to.checked(),
    )


def _prompts(given: TeacherCaptionOptions) -> list[Prompt]:
    from vlv.jobs.teacher.prompts import Prompt, read_prompts

    texts = given.ask.prompt
    if given.teacher.takes_prompts:
        return read_prompts(texts or ["exhaustive"])
    if texts:
        raise ConfigError(
            "--prompt has no effect on a model of vlv; name --endpoint or --vlm, or leave it out"
        )
    return [Prompt("vlv", "-")]


def _remote(given: TeacherCaptionOptions) -> EndpointTeacher:
    from vlv.jobs.teacher.remote import EndpointTeacher, Shrink

    teacher = given.teacher
    if teacher.vlm is not None:
        raise ConfigError("--endpoint and --vlm name two teachers; leave one out")
    if teacher.model is None:
        raise ConfigError("name the endpoint's model with --model")
    if teacher.revision is not None:
        raise ConfigError("--revision has no effect without --vlm or a model of vlv")
    if teacher.adapter is not None:
        raise ConfigError("--adapter has no effect without a model of vlv; leave it out")
    return EndpointTeacher(
        given.endpoint.endpoint(str(teacher.url), teacher.model),
        Shrink(given.shrink.max_side, given.shrink.jpeg_quality),
        given.endpoint.budget(),
        given.endpoint.prices(),
        given.ask.seed,
    )


def _local(given: TeacherOptions, endpoint: common.EndpointOptions) -> Teacher:
    from vlv.jobs.teacher.local import LocalTeacher, TransformersModel, vlv_model
    from vlv.models.adapter import adapted_name

    if unused := changed(endpoint):
        raise ConfigError(f"{unused[0]} has no effect without --endpoint")
    if given.vlm is not None and given.adapter is not None:
        raise ConfigError("--adapter has no effect beside --vlm; leave it out")
    where = common.placement(given.device, given.dtype)
    name = given.vlm or given.model or common.SHIPPED_MODEL
    shown = adapted_name(name, given.adapter)

    def load() -> BatchModel:
        if given.vlm is not None:
            return TransformersModel(name, given.revision, where.device, where.dtype).answer
        pipe = common.load_pipeline(
            name, ["caption"], revision=given.revision, adapter=given.adapter, placement=where
        )
        return vlv_model(pipe, shown)

    return LocalTeacher(shown, load, given.batch_size, {"revision": given.revision})


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
    with _Progress(job) as bar:
        tally = job.run(lambda error: bar.report([error]), bar.skip)
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


class _Progress(common.Progress):
    """Progress, with what is spent so far."""

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
