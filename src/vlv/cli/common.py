"""What the commands share: options, loading a model, and talking to the user on stderr."""

from __future__ import annotations

import logging
import os
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from vlv import progress
from vlv.cli.options import option_group
from vlv.errors import OtherProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from vlv.data.parts import Detail
    from vlv.data.records import Record
    from vlv.data.source import Source
    from vlv.endpoint import Budget, Endpoint, Prices
    from vlv.errors import VLVError
    from vlv.jobs.images import SampleSettings
    from vlv.jobs.tally import Tally
    from vlv.jobs.wording import Wording
    from vlv.models.folder import Task
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.placement import Placement

PREEMPTED = 75
"""Exit code of training that SIGTERM or SIGUSR1 stopped, with its state saved (EX_TEMPFAIL: try again)."""

SHIPPED_MODEL = "vlv-tiny"
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Image files, folders, globs, .tar shards, .jsonl or .parquet lists, embeddings of vlv embed."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="vlv-tiny (shipped), vlv-3b (downloaded at first use), a model folder, or OWNER/NAME on the hub.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help=r"LoRA adapter of the model, such as RUN_DIR/adapter, or OWNER/NAME on the hub (vlv\[lora]).",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Download a model such as vlv-3b without asking.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
]
DType = Annotated[
    str, typer.Option(help="auto, float32, float16 or bfloat16; auto is bfloat16 on a GPU.")
]
VAEMode = Literal["whole", "sliced", "tiled"]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images processed together.")]
RunDir = Annotated[Path, typer.Option(help="Folder of the run; the same command goes on.")]
Recursive = Annotated[bool, typer.Option(help="Look into subfolders.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first N inputs.")]
ImageRoot = Annotated[
    str | None,
    typer.Option(
        help="Folder below which the images of a table may lie, beside its own.",
        rich_help_panel="Images",
    ),
]
CaptionColumn = Annotated[
    str | None,
    typer.Option(
        help="Name of the caption in tables, or its suffix or metadata field in tars; the usual names by default.",
        rich_help_panel="Images",
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(min=0, help="Guidance scale; 1 is none.")]
OnExisting = Annotated[
    Literal["skip", "overwrite", "error"],
    typer.Option(help="What to do with results that exist already."),
]


@option_group("Images")
class InputOptions:
    """Which images a command works on."""

    inputs: Inputs
    recursive: Recursive = True
    limit: Limit = None
    image_column: Annotated[
        str | None,
        typer.Option(help="Name of the image in tables; the usual names by default."),
    ] = None
    image_root: ImageRoot = None

    def find(self, caption_column: str | None = None, *, detail: Detail = "images") -> list[Record]:
        """Records of the inputs, in order; captions and metadata are only read where `detail` says so."""
        return self.source(caption_column, detail=detail).records()[: self.limit]

    def source(self, caption_column: str | None = None, *, detail: Detail = "images") -> Source:
        """The inputs, which are not read yet; without the limit."""
        from vlv.data.records import Columns
        from vlv.data.source import Source

        columns = Columns(self.image_column, caption_column, image_root=self.image_root)
        return Source(self.inputs, columns, recursive=self.recursive, detail=detail)


@option_group("Model and device")
class ModelOptions:
    """Which model a command uses, and where it runs."""

    model: Model = SHIPPED_MODEL
    revision: Revision = None
    adapter: Adapter = None
    device: Device = "auto"
    dtype: DType = "auto"
    offload: Annotated[
        bool,
        typer.Option("--offload", help="For small GPUs: load each part only while it works."),
    ] = False
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the slowest parts first: a minute or two, for many images."
        ),
    ] = False
    yes: Yes = False

    def placement(self, vae: VAEMode = "whole", llm_bits: int | None = None) -> Placement:
        """Where and how the model runs; wrong values are refused before anything is loaded."""
        return placement(self.device, self.dtype, self.offload, vae, llm_bits, self.compiled)

    @property
    def name(self) -> str:
        """What results say that they were made with; with an adapter it is another model."""
        from vlv.models.adapter import adapted_name

        return adapted_name(self.model, self.adapter)

    def load(self, parts: Sequence[Task] | None, placement: Placement | None = None) -> VLVPipeline:
        """Load the parts of the model that a command needs, or all that it has, and place them."""
        return load_pipeline(
            self.model,
            parts,
            revision=self.revision,
            adapter=self.adapter,
            placement=placement or self.placement(),
            yes=self.yes,
        )


@option_group("Sampling")
class SamplingOptions:
    """How the diffusion decoder samples images."""

    steps: Steps = 20
    guidance: Guidance = 2.0
    sampler: Annotated[
        Literal["dpm", "ddim", "ddpm"],
        typer.Option(help="dpm is DPM-Solver++; ddpm adds noise at every step."),
    ] = "dpm"
    vae: Annotated[
        VAEMode,
        typer.Option(help="sliced decodes one image at a time, tiled in pieces: less memory."),
    ] = "whole"
    seed: Seed = 0

    def settings(self, model: ModelOptions) -> SampleSettings:
        """Everything that a sampled image depends on."""
        from vlv.jobs.images import SampleSettings

        return SampleSettings(
            model.name, model.revision, self.steps, self.guidance, self.sampler, self.seed
        )


WORDING = "Words"


@option_group(WORDING)
class WordingOptions:
    """Words that go into every caption."""

    prefix: Annotated[str | None, typer.Option(help="Text before every caption, as it is.")] = None
    suffix: Annotated[str | None, typer.Option(help="Text behind every caption, as it is.")] = None
    trigger: Annotated[
        str | None,
        typer.Option(help="Word and comma that captions begin with, unless they name it already."),
    ] = None

    def wording(self, max_words: int | None = None) -> Wording:
        """What is done to the text of a caption."""
        from vlv.jobs.wording import Wording

        return Wording(self.prefix, self.suffix, self.trigger, max_words)


@option_group("Endpoint")
class EndpointOptions:
    """How an OpenAI-compatible endpoint is asked, and what may be spent."""

    key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the endpoint's key.")
    ] = None
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at a time.")] = 16
    requests_per_minute: Annotated[float | None, typer.Option(help="Most requests a minute.")] = (
        None
    )
    tokens_per_minute: Annotated[float | None, typer.Option(help="Most tokens a minute.")] = None
    endpoint_settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            help="More settings: timeout=60, retries=3, 'extra={reasoning_effort: none}' (repeatable).",
        ),
    ] = field(default_factory=list)
    price_in: Annotated[float, typer.Option(help="USD per million prompt tokens.")] = 0.0
    price_out: Annotated[float, typer.Option(help="USD per million answer tokens.")] = 0.0
    max_requests: Annotated[int | None, typer.Option(help="Budget in requests, over all runs.")] = (
        None
    )
    max_total_tokens: Annotated[
        int | None, typer.Option(help="Budget in tokens, over all runs.")
    ] = None
    max_usd: Annotated[float | None, typer.Option(help="Budget in USD, over all runs.")] = None

    def endpoint(self, url: str, model: str) -> Endpoint:
        """The endpoint at an address."""
        from vlv.endpoint import Endpoint, read_changes

        return Endpoint(
            url,
            model,
            key_env=self.key_env,
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            **read_changes(self.endpoint_settings),
        )

    def budget(self) -> Budget:
        """What may be spent."""
        from vlv.endpoint import Budget

        return Budget(self.max_requests, self.max_total_tokens, self.max_usd)

    def prices(self) -> Prices:
        """What tokens cost."""
        from vlv.endpoint import Prices

        return Prices(self.price_in, self.price_out)


say = progress.say


def complain(message: str) -> None:
    """Say why a command ends, on one line, without anything that looks like a key."""
    from vlv.endpoint.secrets import without_secrets

    say(f"vlv: {without_secrets(' '.join(message.split()))}")


def say_once(message: str) -> None:
    """Write one line to stderr for all the processes that were launched together."""
    if _is_first_process():
        say(message)


def train(work: Callable[[], str]) -> int:
    """Carry out work that trains, say the line that it returns, and return the exit code; it may be stopped and resumed."""
    from vlv.training.interrupt import Interrupted

    try:
        say_once(work())
    except Interrupted as interruption:
        say_once(str(interruption))
        if interruption.preempted:
            return PREEMPTED
        raise
    return 0


def is_to_be_told(error: VLVError) -> bool:
    """Whether this process has to tell of an error: one sentence is enough for all that train together."""
    if isinstance(error, OtherProcessError):
        return not error.told and _is_first_process()
    return True


def _is_first_process() -> bool:
    """As torchrun and `accelerate launch` count them."""
    return int(os.environ.get("RANK", "0")) == 0


class _Say(logging.Handler):
    """Shows warnings of vlv as lines of their own, so that none runs into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def share_processor() -> None:
    """Let idle threads sleep instead of spin, unless the user has chosen; before torch is imported.

    As many threads as cores is right on a quiet machine. On a busy one a thread that spins takes the core from the one
    it waits for: the same step took three times as long as with sleeping threads, or as with one (docs/performance.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quieten() -> None:
    """Silence what third-party libraries say on import; it concerns no user of the command line.

    Importing the diffusers pipelines warns twice that torchvision is missing, which is on purpose, and imports the
    packages for fewer bits where they are installed, which name every kernel that this machine has no use for.
    """
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    logger = logging.getLogger("vlv")
    if not any(isinstance(handler, _Say) for handler in logger.handlers):
        logger.addHandler(_Say())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def load_pipeline(
    model: str,
    parts: Sequence[Task] | None,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    placement: Placement | None = None,
    yes: bool = False,
) -> VLVPipeline:
    """Load what a command needs of a model, and place it; a released one is downloaded first.

    Args:
        model: Name or folder.
        parts: What it is for; None is all that it can.
        revision: Of a model on the hub.
        adapter: Folder or id of a LoRA adapter of the model.
        placement: Where it runs.
        yes: Download without asking.
    """
    from transformers.utils.logging import disable_progress_bar

    from vlv.cli.released import make_ready
    from vlv.models.folder import released_names
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.placement import Placement, pick_device, pick_dtype, place

    disable_progress_bar()  # one bar per part, for weights that load in a moment
    if model == SHIPPED_MODEL:
        say(
            "note: vlv-tiny knows the toy world only (rendered solids on a floor); "
            "for photographs name a real model: --model vlv-3b, a folder, or OWNER/NAME"
        )
    if model in released_names() and not Path(model).is_dir():
        make_ready(model, parts, revision, yes=yes)
    placement = placement or Placement()
    dtype = pick_dtype(placement.dtype, pick_device(placement.device))
    pipe = VLVPipeline.from_pretrained(
        model, parts=parts, revision=revision, adapter=adapter, dtype=dtype
    )
    place(pipe, placement)
    return pipe


def placement(
    device: str,
    dtype: str = "auto",
    offload: bool = False,
    vae: VAEMode = "whole",
    llm_bits: int | None = None,
    compiled: bool = False,
) -> Placement:
    """The options of a command as a Placement; wrong ones are refused before anything is loaded."""
    from vlv.errors import ConfigError
    from vlv.models.placement import Placement, pick_device, pick_dtype

    pick_dtype(dtype, pick_device(device))
    if llm_bits not in (None, 4, 8):
        raise ConfigError(f"--llm-bits is {llm_bits}; choose 8 or 4, or leave it out")
    bits = cast("Literal[4, 8] | None", llm_bits)
    return Placement(device, dtype, offload, vae, bits, compiled)


def quiet_device(device: str) -> torch.device:
    """The device of an option; from now on weights load without a progress bar for each part."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from vlv.models.placement import pick_device

    disable_progress_bar()
    return torch.device(pick_device(device))


def dtype_name(placement: Placement) -> str:
    """The dtype that a placement stands for on this machine, such as float32."""
    from vlv.models.placement import pick_device, pick_dtype

    dtype = pick_dtype(placement.dtype, pick_device(placement.device))
    return str(dtype).removeprefix("torch.")


class Progress(progress.Progress):
    """Progress of a command, which names bad files and says at the end what an interruption leaves.

    Args:
        total: Number of inputs; None where it is not known.
        what: What is being done, in front of the numbers.
        unit: What is counted.
        resumable: Whether the same command goes on after an interruption.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        what: str = "",
        unit: str = "image",
        resumable: bool = True,
    ) -> None:
        super().__init__(total, what=what, unit=unit)
        self._resumable, self._seen = resumable, 0

    def report(self, errors: Sequence[str | None]) -> None:
        """Name the bad files of a batch, one entry per file, and move on by so many."""
        for error in errors:
            if error is not None:
                say(f"failed: {error}")
        self.advance(len(errors))

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._seen += count
        super().advance(count)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if kind is KeyboardInterrupt and self._resumable:
            say(f"{self._seen} results are kept; the same command goes on from there")


def close(tally: Tally, where: Path | str | None = None) -> int:
    """Print the closing line and return the exit code."""
    say(tally.line() + (f" -> {where}" if where else ""))
    return tally.exit_code
