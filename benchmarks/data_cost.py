"""What the paper's data cost: hours, machines, disk and USD, from rates that were measured here.

    python benchmarks/data_cost.py
    python benchmarks/data_cost.py --write docs/datasets.md

Reads benchmarks/results/filter-cpu.json and teacher-cpu.json. What was not measured here is an assumption, is
named as one, and is an option of this command.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- costs: written by benchmarks/data_cost.py -->", "<!-- end of costs -->"
HOUR = 3600


@dataclass(frozen=True)
class Assumptions:
    """What is not measured here."""

    kept: float = 40e6
    """images that the paper keeps"""
    kept_share: float = 0.5
    """share of the downloaded images that the rules keep"""
    downloaded_share: float = 0.7
    """share of the addresses that still give an image"""
    captions: float = 6e6
    """captions of the paper's stage 2"""
    cores: float = 16
    """cores of a machine"""
    usd_per_core_hour: float = 0.04
    """price of a core"""
    usd_per_tb_month: float = 23
    """price of disk"""
    fetched_kb: float = 150
    """kilobytes of an image as it is fetched"""
    urls_per_hour: float = 5e6
    """addresses that img2dataset fetches in an hour on one machine (its own README: 100 million in 20 h)"""
    tokens_in: float = 700
    """tokens of the prompt with its image"""
    tokens_out: float = 300
    """tokens of an answer"""
    usd_per_million_in: float = 0.10
    """price of a million tokens of prompts"""
    usd_per_million_out: float = 0.40
    """price of a million tokens of answers"""
    requests_per_minute: float = 2000
    """requests that the endpoint allows"""


@dataclass(frozen=True)
class Measured:
    """What was measured here.

    Attributes:
        headers: Images per second and core, rules on headers.
        decode: Images per second and core, all rules.
        jpeg_kb: Kilobytes of a JPEG of 384 pixels.
        client: Captions per second that the client manages against an endpoint that answers at once.
    """

    headers: float
    decode: float
    jpeg_kb: float
    client: float


def read_measured(filtering: Path, teacher: Path) -> Measured:
    """The rates from the files of the two benchmarks."""
    for path in (filtering, teacher):
        if not path.exists():
            raise SystemExit(
                f"{path} is missing; measure first: python benchmarks/{_script(path)} --json {path}"
            )
    figures = json.loads(filtering.read_text(encoding="utf-8"))
    rates = {
        speed["rules"]: speed["images_per_second"]
        for speed in figures["speeds"]
        if speed["workers"] == 1
    }
    client = _find(json.loads(teacher.read_text(encoding="utf-8")), "whole_command")
    return Measured(
        rates["headers"],
        rates["decode"],
        figures["jpeg"]["mean_bytes"] / 1000,
        client["images_per_second"],
    )


def _script(path: Path) -> str:
    return path.name.partition("-")[0] + ".py"


def _find(values: Any, name: str) -> Any:
    """The value of a key at any depth."""
    if isinstance(values, dict):
        if name in values:
            return values[name]
        for value in values.values():
            found = _find(value, name)
            if found is not None:
                return found
    return None


def steps(measured: Measured, assumed: Assumptions) -> list[dict[str, Any]]:
    """Each step of the chain: what it works on, hours of one machine, disk in TB, USD."""
    downloaded = assumed.kept / assumed.kept_share
    addresses = downloaded / assumed.downloaded_share
    core_hour = assumed.usd_per_core_hour

    def by_cores(name: str, count: float, rate: float, kb: float) -> dict[str, Any]:
        hours = count / rate / HOUR
        return _step(name, count, hours / assumed.cores, count * kb / 1e9, hours * core_hour)

    fetching = addresses / assumed.urls_per_hour
    asking = assumed.captions / min(measured.client, assumed.requests_per_minute / 60) / HOUR
    tokens = (
        assumed.tokens_in * assumed.usd_per_million_in
        + assumed.tokens_out * assumed.usd_per_million_out
    )
    return [
        _step(
            "fetch with img2dataset",
            addresses,
            fetching,
            downloaded * assumed.fetched_kb / 1e9,
            fetching * assumed.cores * core_hour,
        ),
        by_cores(
            "filter, the paper's rules (headers)",
            downloaded,
            measured.headers,
            assumed.fetched_kb * assumed.kept_share,
        ),
        by_cores(
            "or: filter, every rule (decoding)",
            downloaded,
            measured.decode,
            assumed.fetched_kb * assumed.kept_share,
        ),
        _step(
            "keep 40 million at 384 pixels",
            assumed.kept,
            0,
            assumed.kept * measured.jpeg_kb / 1e9,
            0,
        ),
        _step(
            "caption through an endpoint",
            assumed.captions,
            asking,
            assumed.captions * assumed.tokens_out * 5 / 1e12,  # about 5 bytes a token
            assumed.captions * tokens / 1e6,
        ),
    ]


def _step(name: str, count: float, hours: float, terabytes: float, usd: float) -> dict[str, Any]:
    return {"step": name, "count": count, "hours": hours, "tb": terabytes, "usd": usd}


def table(measured: Measured, assumed: Assumptions) -> str:
    """The steps as Markdown, with what they rest on."""
    lines = [
        f"| step | images | hours, 1 machine of {assumed.cores:g} cores | hours, 16 machines | disk (TB) | disk, a month (USD) | work (USD) |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in steps(measured, assumed):
        many = step["hours"] if step["step"].startswith("caption") else step["hours"] / 16
        lines.append(
            f"| {step['step']} | {step['count'] / 1e6:.0f} M | {step['hours']:.3g} | {many:.3g} | "
            f"{step['tb']:.2g} | {step['tb'] * assumed.usd_per_tb_month:.0f} | {step['usd']:.0f} |"
        )
    lines += [
        "",
        f"Measured here: {measured.headers:,.0f} images per second and core by headers, {measured.decode:,.0f} with decoding "
        f"(384-pixel JPEGs of {measured.jpeg_kb:.0f} kB; larger images decode in proportion to their pixels), "
        f"{measured.client:,.0f} captions per second through the client, whose limit then is the endpoint's "
        f"{assumed.requests_per_minute:,.0f} requests a minute. Not measured, each an option of the command:",
        "",
    ]
    words = {field.name: _doc(field.name) for field in fields(Assumptions)}
    lines += [
        f"- `--{name.replace('_', '-')} {getattr(assumed, name):g}`: {text}"
        for name, text in words.items()
    ]
    return "\n".join(lines)


def _doc(name: str) -> str:
    """The docstring below a field of `Assumptions`."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    place = next(n for n, line in enumerate(lines) if line.strip().startswith(f"{name}: float ="))
    return lines[place + 1].strip().strip('"')


def write(path: Path, text: str) -> None:
    """Put the table between its marks in a document."""
    content = path.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no place for the table: {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Print the table, or write it into a document."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--filter-json", type=Path, default=RESULTS / "filter-cpu.json")
    parser.add_argument("--teacher-json", type=Path, default=RESULTS / "teacher-cpu.json")
    parser.add_argument("--write", type=Path, help="document with a place for the table")
    for field in fields(Assumptions):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            option, type=float, default=field.default, help=_doc(field.name).replace("%", "%%")
        )
    values = vars(parser.parse_args())
    measured = read_measured(values["filter_json"], values["teacher_json"])
    assumed = Assumptions(**{field.name: values[field.name] for field in fields(Assumptions)})
    text = table(measured, assumed)
    print(text)
    if values["write"] is not None:
        write(values["write"], text)


if __name__ == "__main__":
    main()
