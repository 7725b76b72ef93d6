"""What workers do to the images of one shard: the very jobs that write one file, each with a file for the shard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vlv.data.records import Absent
from vlv.jobs.caption import CaptionJob, CaptionOutput
from vlv.jobs.caption_files import Captioned, own_captions
from vlv.jobs.embed import EmbedJob
from vlv.jobs.inputs import BatchSize
from vlv.jobs.verify import VerifyJob

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlv.data.parts import Detail
    from vlv.data.records import Record
    from vlv.jobs.caption_settings import CaptionSettings
    from vlv.jobs.embed import EmbedSettings
    from vlv.jobs.tally import Tally
    from vlv.jobs.verify import VerifySettings
    from vlv.models.doubts import ReadClaims
    from vlv.models.pipeline import VLVPipeline
    from vlv.storage import Json

    Load = Callable[[], VLVPipeline]
    Report = Callable[[Sequence[str | None]], None]
    """Told the error of each image that was worked on, None for a good one."""


class Operator(Protocol):
    """Work on the images of a shard."""

    @property
    def command(self) -> str:
        """Name of the command."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that it writes."""

    @property
    def detail(self) -> Detail:
        """What it needs to know of an image."""

    @property
    def about(self) -> Json:
        """All that its results depend on, besides the images."""

    def run(self, records: Sequence[Record], path: Path, load: Load, report: Report) -> Tally:
        """Write the files of a shard: `path` with each of the suffixes, or none where no image is good."""


class CaptionShards:
    """Captions as JSON Lines."""

    command, suffixes = "caption", (".jsonl",)

    def __init__(self, settings: CaptionSettings, batch_size: str) -> None:
        self._settings, self._size = settings, BatchSize.parse(batch_size)
        self.detail: Detail = "images" if settings.context_column is None else "texts"

    @property
    def about(self) -> Json:
        """See `Operator`."""
        return asdict(self._settings)

    def run(self, records: Sequence[Record], path: Path, load: Load, report: Report) -> Tally:
        """See `Operator`."""
        job = CaptionJob(records, self._settings, CaptionOutput(path.with_suffix(".jsonl")))
        return job.run(
            load,
            batch_size=self._size,
            report=lambda rows: report([row["error"] for row in rows]),
        )


class EmbedShards:
    """Caption embeddings as safetensors, each with a JSON file that says whose they are."""

    command, suffixes = "embed", (".safetensors", ".json")
    detail: Detail = "images"

    def __init__(self, settings: EmbedSettings, batch_size: int) -> None:
        self._settings, self._size = settings, batch_size
        self._model_hash: str | None = None

    @property
    def about(self) -> Json:
        """See `Operator`."""
        return asdict(self._settings)

    def run(self, records: Sequence[Record], path: Path, load: Load, report: Report) -> Tally:
        """See `Operator`."""
        output = path.with_suffix(".safetensors")
        job = EmbedJob(records, self._settings, output, model_hash=self._model_hash)
        tally = job.run(
            load,
            batch_size=self._size,
            report=lambda batch: report([item.error for item in batch]),
        )
        self._model_hash = job.model_hash
        return tally


class VerifyShards:
    """Verdicts on the captions that lie beside the images, as JSON Lines."""

    command, suffixes = "verify", (".jsonl",)
    detail: Detail = "texts"

    def __init__(self, settings: VerifySettings, batch_size: str, read_claims: ReadClaims) -> None:
        self._settings, self._read_claims = settings, read_claims
        self._size = BatchSize.parse(batch_size)

    @property
    def about(self) -> Json:
        """See `Operator`."""
        return asdict(self._settings)

    def run(self, records: Sequence[Record], path: Path, load: Load, report: Report) -> Tally:
        """See `Operator`."""
        captions = [_with_reason(captioned) for captioned in own_captions(records)]
        output = path.with_suffix(".jsonl")
        job = VerifyJob(captions, self._settings, output, read_claims=self._read_claims)
        return job.run(
            load,
            batch_size=self._size,
            report=lambda rows: report([row["error"] for row in rows]),
        )


def _with_reason(captioned: Captioned) -> Captioned:
    """A damaged file has no caption either, which is not what is wrong with it."""
    record = captioned.record
    if record is None or not isinstance(record.source, Absent):
        return captioned
    return Captioned(captioned.id, record, error=record.source.reason)
