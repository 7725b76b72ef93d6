"""What the commands share: options, loading a model, and talking to the user on stderr."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from tqdm import tqdm

from vlv.errors import OtherProcessError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.data.records import Record
    from vlv.errors import VLVError
    from vlv.jobs.tally import Tally
    from vlv.models.folder import Task
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.placement import Placement

PREEMPTED = 75
"""Exit code of training that SIGTERM or SIGUSR1 stopped, with its state saved (EX_TEMPFAIL: try again)."""

SHIPPED_MODEL = "vlv-tiny"
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")

Inputs = Annotated[
    list[str],
    typer.Argument(help="Image files, folders, globs, .tar shards, .jsonl or .parquet lists."),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="vlv-tiny (shipped), a model folder, or OWNER/NAME on the hub."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")
]
DType = Annotated[
    str, typer.Option(help="auto, float32, float16 or bfloat16; auto is bfloat16 on a GPU.")
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="For small GPUs: each part is there only while it works."),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Translate the slowest parts first: a minute or two, for many images."
    ),
]
VAEMode = Literal["whole", "sliced", "tiled"]
VAE = Annotated[
    VAEMode, typer.Option(help="sliced decodes one image at a time, tiled in pieces: less memory.")
]
LLMBits = Annotated[
    int | None, typer.Option(help="8 or 4 bits for the language model's weights (vlv[quant]).")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images worked on together.")]
Recursive = Annotated[bool, typer.Option(help="Look into subfolders.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first N inputs.")]
ImageColumn = Annotated[
    str | None,
    typer.Option(help="What the image is called in tables; the usual names by default."),
]
CaptionColumn = Annotated[
    str | None,
    typer.Option(
        help="What the caption is called in tables, or its suffix or metadata field in tars; the usual names by default."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(min=0, help="Guidance scale; 1 is none.")]
Sampler = Annotated[
    Literal["dpm", "ddim", "ddpm"],
    typer.Option(help="dpm is DPM-Solver++; ddpm draws noise at every step."),
]


def say(message: str) -> None:
    """Write one line to stderr."""
    typer.echo(message, err=True)


def say_once(message: str) -> None:
    """Write one line to stderr for all the processes that were launched together."""
    if _is_first_process():
        say(message)


def is_to_be_told(error: VLVError) -> bool:
    """Whether this process has to tell of an error: one sentence is enough for all that train together."""
    if isinstance(error, OtherProcessError):
        return not error.told and _is_first_process()
    return True


def _is_first_process() -> bool:
    """As torchrun and `accelerate launch` count them."""
    return int(os.environ.get("RANK", "0")) == 0


def quieten() -> None:
    """Silence what third-party libraries say on import; it concerns no user of the command line.

    Importing the diffusers pipelines warns twice that torchvision is missing, which is on purpose, and imports the
    packages for fewer bits where they are installed, which name every kernel that this machine has no use for.
    """
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def find_inputs(
    inputs: Sequence[str],
    recursive: bool,
    limit: int | None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> list[Record]:
    """Records of the inputs, in order."""
    from vlv.data.records import Columns, find_records

    columns = Columns(image_column, caption_column)
    return find_records(list(inputs), recursive=recursive, columns=columns)[:limit]


def load_pipeline(
    model: str,
    parts: Sequence[Task] | None,
    *,
    revision: str | None = None,
    placement: Placement | None = None,
) -> VLVPipeline:
    """Load what a command needs of a model, and place it; say so when it is the shipped one."""
    from transformers.utils.logging import disable_progress_bar

    from vlv.models.pipeline import VLVPipeline
    from vlv.models.placement import Placement, pick_device, pick_dtype, place

    disable_progress_bar()  # one bar per part, for weights that load in a moment
    if model == SHIPPED_MODEL:
        say(
            "note: vlv-tiny knows the toy world only (rendered solids on a floor); "
            "for photographs name a real model: --model FOLDER or --model OWNER/NAME"
        )
    placement = placement or Placement()
    dtype = pick_dtype(placement.dtype, pick_device(placement.device))
    pipe = VLVPipeline.from_pretrained(model, parts=parts, revision=revision, dtype=dtype)
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
    bits: Any = llm_bits
    return Placement(device, dtype, offload, vae, bits, compiled)


def dtype_name(placement: Placement) -> str:
    """The dtype that a placement stands for on this machine, such as float32."""
    from vlv.models.placement import pick_device, pick_dtype

    dtype = pick_dtype(placement.dtype, pick_device(placement.device))
    return str(dtype).removeprefix("torch.")


class Progress:
    """A bar on stderr, and the names of bad files.

    Args:
        total: Number of inputs.
        resumable: Whether the same command goes on after an interruption.
    """

    def __init__(self, total: int, *, resumable: bool = True) -> None:
        self._bar = tqdm(total=total, unit="image", disable=not sys.stderr.isatty())
        self._resumable = resumable
        self._seen = 0

    def report(self, errors: Sequence[str | None]) -> None:
        """Name the bad files of a batch, one entry per file, and move the bar."""
        for error in errors:
            if error is not None:
                with self._bar.external_write_mode(sys.stderr):
                    say(f"failed: {error}")
        self._seen += len(errors)
        self._bar.update(len(errors))

    def skip(self) -> None:
        """Move the bar past one whose result is there; it does not count for the speed."""
        if not self._bar.disable:
            self._bar.initial += 1
            self._bar.n += 1
            self._bar.last_print_n += 1

    def postfix(self, text: str) -> None:
        """Show something behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt and self._resumable:
            say(f"{self._seen} results are kept; the same command goes on from there")


def close(tally: Tally, where: Path | str | None = None) -> int:
    """Print the closing line and return the exit code."""
    say(tally.line() + (f" -> {where}" if where else ""))
    return tally.exit_code
