"""One page that tells a run: RUN/summary.html, without network, scripts or other files beside it."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import shlex
import statistics
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

from vlv.errors import ConfigError
from vlv.storage import write_text
from vlv.training.curves import line_chart, number_text
from vlv.training.journal import read_metrics
from vlv.training.samples import read_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from vlv.training.curves import Points

logger = logging.getLogger(__name__)

SUMMARY = "summary.html"
_SHOWN_STEPS, _SHOWN_CAPTIONS, _MAX_SIDE = 6, 4, 256
_NOT_A_LOSS = {
    *("step", "kind", "lr", "grad_norm", "skipped_steps", "images_per_second", "elapsed_seconds"),
    *("eta_seconds", "device_hours", "cost_usd", "mfu", "peak_memory_gib"),
}


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells."""

    folder: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    lines: list[dict[str, Any]]

    @property
    def train(self) -> list[dict[str, Any]]:
        """The lines of training."""
        return [line for line in self.lines if line["kind"] == "train"]

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

    def names(self, kind: str) -> list[str]:
        """Names of the figures of a kind, in the order of their first appearance."""
        return list(dict.fromkeys(n for line in self.lines if line["kind"] == kind for n in line))


def write_summary(run_dir: Path) -> Path:
    """Write the page of a run, finished or not.

    Raises:
        ConfigError: The folder holds no run.
        OSError: It cannot be written.
    """
    run = read_run(run_dir)
    page = Template((resources.files("vlv.training") / "summary.html").read_text("utf-8"))
    finished = run.is_finished
    title = f"{run.settings.get('stage', 'training')} · {run_dir.absolute().name}"
    text = page.substitute(
        title=html.escape(title),
        state="finished"
        if finished
        else f"{100 * run.step / run.settings['loop']['steps']:.0f} % done",
        state_class="done" if finished else "going",
        totals="".join(_totals(run)),
        next=_next_command(run),
        curves="".join(_curves(run)) or "<p>Nothing was logged yet.</p>",
        samples=_samples(run_dir / "samples"),
        quarantine=_quarantine(run_dir),
        settings=html.escape(yaml.safe_dump(run.settings, sort_keys=False)),
        versions="".join(_row(name, value) for name, value in run.versions.items()),
    )
    write_text(run_dir / SUMMARY, text)
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


# --- the head --------------------------------------------------------------------------------------


def _totals(run: RunRecord) -> Iterator[str]:
    """Cards with one number each."""
    last = {key: value for line in run.lines for key, value in line.items()}
    steps = run.settings["loop"]["steps"]
    yield _card("steps", f"{run.step:,}", f"of {steps:,}")
    speeds = [line["images_per_second"] for line in run.train if "images_per_second" in line]
    if "loss" in last:
        yield _card("loss", f"{last['loss']:.4f}", "of the last log line")
    if "elapsed_seconds" in last:
        left = "" if run.is_finished else f"{duration(last.get('eta_seconds', 0))} to go"
        yield _card("time", duration(last["elapsed_seconds"]), left or "training and looking")
    if speeds:
        yield _card("images/s", number_text(statistics.median(speeds)), "median")
    if "mfu" in last:
        mfu = statistics.median(value for _, value in run.series("mfu", "train"))
        yield _card("MFU", f"{100 * mfu:.1f} %", "of the device's peak")
    if "device_hours" in last:
        yield _card("device hours", number_text(last["device_hours"]), "all processes")
    if "cost_usd" in last:
        price = run.settings["loop"].get("usd_per_gpu_hour")
        yield _card(
            "cost",
            f"{last['cost_usd']:,.2f} USD",
            f"at {price:g} USD per GPU hour" if price else "",
        )
    if "peak_memory_gib" in last:
        yield _card("memory", f"{last['peak_memory_gib']:.1f} GiB", "peak, first GPU")
    if last.get("skipped_steps"):
        yield _card("skipped steps", str(last["skipped_steps"]), "loss or gradient not finite")


def _card(name: str, value: str, note: str) -> str:
    return f"<div><span>{name}</span><b>{value}</b><small>{html.escape(note)}</small></div>"


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


def _next_command(run: RunRecord) -> str:
    """What to run next: the result, or the same command again."""
    model = run.folder / "model"
    if run.is_finished and run.settings.get("stage") == "stage2":
        what, command = "Caption with the result", f"vlv caption IMAGES --model {model}"
    elif run.is_finished and run.settings.get("stage") == "stage1":
        what, command = "Rebuild images with the result", f"vlv reconstruct IMAGES --model {model}"
    elif run.is_finished or "command" not in run.versions:
        return ""
    else:
        words = shlex.split(run.versions["command"])
        what, command = "Go on with the same command", shlex.join(["vlv", *words[1:]])
    return f"<p>{what}:</p><pre class=command>{html.escape(command)}</pre>"


# --- curves ----------------------------------------------------------------------------------------


def _curves(run: RunRecord) -> Iterator[str]:
    losses = [
        name for name in run.names("train") if name not in _NOT_A_LOSS and "share" not in name
    ]
    if len(losses) == 2:
        losses = losses[:1]  # the total and its only part are the same line
    held_out = [name for name in run.names("eval") if name not in {"step", "kind"}]
    shares = [name for name in held_out if "share" in name]
    others = [
        n for n in held_out if not n.startswith(("held_out", "denoising")) and n not in shares
    ]
    groups = {
        "loss": (losses, "train", False),
        "learning rate": (["lr"], "train", False),
        "held out: loss": ([n for n in held_out if n.startswith("held_out")], "eval", False),
        "held out: denoising given z, no text, the true text": (
            [n for n in held_out if n.startswith("denoising")],
            "eval",
            False,
        ),
        "held out: other figures": (others, "eval", False),
        "held out: from no text (0) to the true text (100 %)": (shares, "eval", True),
        "gradient norm": (["grad_norm"], "train", False),
        "images per second": (["images_per_second"], "train", False),
        "share of the device's peak (MFU)": (["mfu"], "train", True),
        "shares in training": ([n for n in run.names("train") if "share" in n], "train", True),
    }
    for title, (names, kind, percent) in groups.items():
        chart = line_chart({name: run.series(name, kind) for name in names}, percent=percent)
        if chart:
            yield f"<figure><figcaption>{title}</figcaption>{chart}</figure>"


# --- samples ---------------------------------------------------------------------------------------


def _samples(folder: Path) -> str:
    """The held-out images, and what was rebuilt and said of them at some of the steps."""
    pictures = _spread(sorted(folder.glob("[0-9]*.png")))
    texts = _spread(sorted(folder.glob("[0-9]*.txt")))
    parts = [*_picture_table(pictures), *_caption_table(texts)]
    return "".join(parts) or "<p>No samples: the run has no held-out images (data.held_out).</p>"


def _spread(files: Sequence[Path]) -> list[Path]:
    """The first, the last, and some between."""
    if len(files) <= _SHOWN_STEPS:
        return list(files)
    places = (round(i * (len(files) - 1) / (_SHOWN_STEPS - 1)) for i in range(_SHOWN_STEPS))
    return [files[place] for place in places]


def _picture_table(files: Sequence[Path]) -> Iterator[str]:
    sheets = {int(file.stem): read_rows(file) for file in files}
    sheets = {step: rows for step, rows in sheets.items() if rows}
    if not sheets:
        return
    yield "<div class=scroll><table class=pictures>"
    first = next(iter(sheets.values()))
    yield _picture_row("held out", first["held out"])
    for step, rows in sheets.items():
        yield _picture_row(f"step {step:,}", rows["from z"])
    yield "</table></div>"


def _picture_row(label: str, images: Sequence[Image.Image]) -> str:
    cells = "".join(f'<td><img alt="" src="{_data_uri(image)}"></td>' for image in images)
    return f"<tr><th>{label}</th>{cells}</tr>"


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _caption_table(files: Sequence[Path]) -> Iterator[str]:
    said: dict[str, dict[int, str]] = {}
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            name, _, text = line.partition(": ")
            said.setdefault(name, {})[int(file.stem)] = text
    for name, by_step in list(said.items())[:_SHOWN_CAPTIONS]:
        yield f"<h3>{html.escape(Path(name).name)}</h3><table class=captions>"
        for step, text in by_step.items():
            yield f"<tr><th>step {step:,}</th><td>{html.escape(text)}</td></tr>"
        yield "</table>"


# --- the rest --------------------------------------------------------------------------------------


def _quarantine(run_dir: Path) -> str:
    """Bad records by reason."""
    bad: dict[str, str] = {}
    for file in sorted(run_dir.glob("quarantine*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            record = json.loads(line)
            bad[record["id"]] = record["reason"]
    if not bad:
        return "<p>No record was bad.</p>"
    rows = "".join(
        _row(reason, f"{count:,}") for reason, count in Counter(bad.values()).most_common(8)
    )
    example = html.escape(next(iter(bad)))
    return (
        f"<p>{len(bad):,} bad records were left out, such as <code>{example}</code>; "
        f"all are named in <code>quarantine.jsonl</code>.</p><table class=facts>{rows}</table>"
    )


def _row(name: str, value: str) -> str:
    return f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
