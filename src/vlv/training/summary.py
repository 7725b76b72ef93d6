"""The page of a run, RUN/summary.html: totals, curves, samples, bad records, settings."""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

from vlv.errors import ConfigError
from vlv.pages import charts, image_uri, render
from vlv.pages.charts import Points
from vlv.storage import Json, write_text
from vlv.training.journal import read_metrics

SUMMARY = "summary.html"
_SHOWN_STEPS, _SHOWN_CAPTIONS, _MAX_SIZE = 6, 4, (1600, 800)
_NOT_A_LOSS = {
    *("step", "kind", "lr", "grad_norm", "skipped_steps", "images_per_second", "elapsed_seconds"),
    *("eta_seconds", "device_hours", "cost_usd", "mfu", "peak_memory_gib"),
}


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells."""

    folder: Path
    settings: Json
    versions: dict[str, str]
    lines: list[Json]

    @property
    def step(self) -> int:
        """The last step of the log."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= int(self.settings["loop"]["steps"])

    def series(self, name: str, kind: str) -> Points:
        """A figure over the steps."""
        return [(x["step"], x[name]) for x in self.lines if x["kind"] == kind and name in x]

    def values(self, name: str) -> list[float]:
        """A figure of the lines of training."""
        return [value for _, value in self.series(name, "train")]

    def names(self, kind: str) -> list[str]:
        """Names of the figures of a kind, in the order of their first appearance."""
        return list(dict.fromkeys(n for line in self.lines if line["kind"] == kind for n in line))


class Card(NamedTuple):
    """One number in the head of the page."""

    name: str
    value: str
    note: str


def write_summary(run_dir: Path) -> Path:
    """Write the page of a run, finished or not.

    Raises:
        ConfigError: The folder holds no run.
        OSError: It cannot be written.
    """
    run = read_run(run_dir)
    share = run.step / run.settings["loop"]["steps"]
    bad = _bad_records(run_dir)
    page = render(
        "summary.html.jinja",
        title=f"{run.settings.get('stage', 'training')} · {run_dir.absolute().name}",
        finished=run.is_finished,
        state="finished" if run.is_finished else f"{100 * share:.0f} % done",
        cards=list(_cards(run)),
        next=_next_command(run),
        charts=list(_charts(run)) if charts.has_charts() else [],
        no_charts="Nothing was logged yet."
        if charts.has_charts()
        else 'Curves need matplotlib: pip install "vlv[train]".',
        sheets=_sheets(_spread(sorted((run_dir / "samples").glob("[0-9]*.png")))),
        captions=_captions(_spread(sorted((run_dir / "samples").glob("[0-9]*.txt")))),
        bad=bad,
        reasons=[(reason, f"{n:,}") for reason, n in Counter(bad.values()).most_common(8)],
        settings=yaml.safe_dump(run.settings, sort_keys=False),
        versions=run.versions,
    )
    write_text(run_dir / SUMMARY, page)
    return run_dir / SUMMARY


def read_run(run_dir: Path) -> RunRecord:
    """The records of a run folder.

    Raises:
        ConfigError: It holds none.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run_dir} is no run folder: it has no config.yaml; name that of a run")
    settings = yaml.safe_load(config.read_text("utf-8"))
    versions = run_dir / "versions.json"
    known = json.loads(versions.read_text("utf-8")) if versions.is_file() else {}
    return RunRecord(run_dir, settings, known, read_metrics(run_dir / "metrics.jsonl"))


def _cards(run: RunRecord) -> Iterator[Card]:
    last = {key: value for line in run.lines for key, value in line.items()}
    yield Card("steps", f"{run.step:,}", f"of {run.settings['loop']['steps']:,}")
    if "loss" in last:
        yield Card("loss", f"{last['loss']:.4f}", "of the last log line")
    if "elapsed_seconds" in last:
        left = f"{duration(last.get('eta_seconds', 0))} to go"
        note = "training and evaluation" if run.is_finished else left
        yield Card("time", duration(last["elapsed_seconds"]), note)
    if speeds := run.values("images_per_second"):
        yield Card("images/s", _short(statistics.median(speeds)), "median")
    if shares := run.values("mfu"):
        yield Card("MFU", f"{100 * statistics.median(shares):.1f} %", "of the device's peak")
    if "device_hours" in last:
        yield Card("device hours", _short(last["device_hours"]), "all processes")
    if "cost_usd" in last:
        price = run.settings["loop"].get("usd_per_gpu_hour")
        note = f"at {price:g} USD per GPU hour" if price else ""
        yield Card("cost", f"{last['cost_usd']:,.2f} USD", note)
    if "peak_memory_gib" in last:
        yield Card("memory", f"{last['peak_memory_gib']:.1f} GiB", "peak, first GPU")
    if last.get("skipped_steps"):
        yield Card("skipped steps", str(last["skipped_steps"]), "loss or gradient not finite")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> [duration(s) for s in (9, 75, 7320, 200000)]
    ['9 s', '1 min 15 s', '2 h 2 min', '2 d 7 h']
    """
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest = round(seconds)
    parts: list[str] = []
    for name, size in units:
        count, rest = divmod(rest, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def _next_command(run: RunRecord) -> tuple[str, str] | None:
    """What to run next, and the command: use the result, or go on."""
    model, stage = run.folder / "model", run.settings.get("stage")
    if run.is_finished and stage in ("stage2", "stage3"):
        return "Caption with the result", f"vlv caption IMAGES --model {model}"
    if run.is_finished and stage == "stage1":
        return "Reconstruct images with the result", f"vlv reconstruct IMAGES --model {model}"
    if run.is_finished or "command" not in run.versions:
        return None
    words = shlex.split(run.versions["command"])
    return "Go on with the same command", shlex.join(["vlv", *words[1:]])


def _charts(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Titles and SVG elements."""
    training = run.names("train")
    losses = [name for name in training if name not in _NOT_A_LOSS and "share" not in name]
    if len(losses) == 2:
        losses = losses[:1]  # the total and its only part are the same line
    held_out = [name for name in run.names("eval") if name not in {"step", "kind"}]
    shares = [name for name in held_out if "share" in name]
    rest = [name for name in held_out if name not in shares]
    groups = {
        "loss": (losses, "train"),
        "learning rate": (["lr"], "train"),
        "held out: loss": ([n for n in rest if n.startswith("held_out")], "eval"),
        "held out: denoising loss given z, no text, the true caption": (
            [n for n in rest if n.startswith("denoising")],
            "eval",
        ),
        "held out: other figures": (
            [n for n in rest if not n.startswith(("held_out", "denoising"))],
            "eval",
        ),
        "held out: recovered share, from no text (0) to the true caption (100 %)": (shares, "eval"),
        "gradient norm": (["grad_norm"], "train"),
        "images per second": (["images_per_second"], "train"),
        "share of the device's peak (MFU)": (["mfu"], "train"),
        "shares in training": ([n for n in training if "share" in n], "train"),
    }
    for title, (names, kind) in groups.items():
        series = {name: run.series(name, kind) for name in names}
        if chart := charts.line_chart(series, percent="share" in title):
            yield title, chart


def _spread(files: Sequence[Path]) -> list[Path]:
    """The first, the last, and some between."""
    if len(files) <= _SHOWN_STEPS:
        return list(files)
    places = (round(i * (len(files) - 1) / (_SHOWN_STEPS - 1)) for i in range(_SHOWN_STEPS))
    return [files[place] for place in places]


def _sheets(files: Sequence[Path]) -> list[tuple[str, str]]:
    """The held-out images above their reconstructions, at some of the steps."""
    sheets = []
    for file in files:
        with Image.open(file) as image:
            image.thumbnail(_MAX_SIZE)
            sheets.append((f"step {int(file.stem):,}", image_uri(image, "JPEG")))
    return sheets


def _captions(files: Sequence[Path]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The captions of some held-out images at some of the steps."""
    written: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            name, _, text = line.partition(": ")
            written.setdefault(Path(name).name, []).append((f"step {int(file.stem):,}", text))
    return list(written.items())[:_SHOWN_CAPTIONS]


def _bad_records(run_dir: Path) -> dict[str, str]:
    """Bad records with the reason why each was left out."""
    lines = (
        json.loads(line)
        for file in sorted(run_dir.glob("quarantine*.jsonl"))
        for line in file.read_text("utf-8").splitlines()
    )
    return {record["id"]: record["reason"] for record in lines}
