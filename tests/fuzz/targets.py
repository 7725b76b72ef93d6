"""What is done with each case, in a folder of its own; it ends well or with a `VLVError` of one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.data.files import noise_png
from tests.fuzz import seeds
from vlv.curation.measure import measure_part
from vlv.curation.settings import FilterConfig
from vlv.data.images import load_bytes, load_image, read_header
from vlv.data.records import BadRecord, Columns, Record
from vlv.data.source import Source, find_records
from vlv.endpoint.messages import parse_answer
from vlv.errors import VLVError
from vlv.jobs.formats import read_rows
from vlv.models.adapter import read_about
from vlv.models.folder import load_components, read_index
from vlv.models.lora import read_settings, read_weights
from vlv.training.checkpoint import load_checkpoint

RULES = FilterConfig(decode=True, short_side_above=1, aspect_max=20.0)
COLUMNS = Columns(sha256="sha256")


@dataclass(frozen=True)
class Target:
    """Good files, and a function that reads a damaged one below a folder."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], None]


def read_image(data: bytes, folder: Path) -> None:
    for read in (read_header, load_image):
        attempt(lambda read=read: read(data, name="x"))
    (folder / "x.png").write_bytes(data)
    attempt(lambda: find_records([folder / "x.png"])[0].load())


def read_array(data: bytes, folder: Path) -> None:
    load_bytes(data, raw_pixels=True)


def read_tar(data: bytes, folder: Path) -> None:
    path = folder / "x.tar"
    path.write_bytes(data)
    read_source(path)
    listed, passing = list(Source([path]).parts()[0].entries()), list(Source([path]).stream())
    if not any(isinstance(entry, BadRecord) for entry in (*listed, *passing)):
        names = [entry.id.removeprefix(f"{path}/") for entry in passing]
        assert [entry.id for entry in listed] == names, "listed and streamed differ"


def read_parquet(data: bytes, folder: Path) -> None:
    (folder / "x.png").write_bytes(noise_png(0, 4))
    (folder / "x.parquet").write_bytes(data)
    read_source(folder / "x.parquet")


def read_lines(data: bytes, folder: Path) -> None:
    (folder / "x.png").write_bytes(noise_png(0, 4))
    path = folder / "x.jsonl"
    path.write_bytes(data)
    attempt(lambda: look_at(find_records([path], on_damage="keep")))
    measure(path)
    attempt(lambda: list(read_rows(path)))


def read_sheet(data: bytes, folder: Path) -> None:
    (folder / "x.csv").write_bytes(data)
    list(read_rows(folder / "x.csv", {"n": int}))


def read_sidecars(data: bytes, folder: Path) -> None:
    (folder / "x.png").write_bytes(noise_png(0, 4))
    for suffix in (".txt", ".json"):
        (folder / f"x{suffix}").write_bytes(data)
    look_at(find_records([folder]))
    measure(folder)


def read_embeddings(data: bytes, folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(data)
    for record in find_records([folder / "x.safetensors"]):
        attempt(record.embedding)


def read_answer(data: bytes, folder: Path) -> None:
    problem = ""
    try:
        parse_answer(data, 10)
    except ValueError as error:  # the client's word for it
        problem = str(error)
    assert problem.startswith("the answer") or not problem, problem


def read_model_index(data: bytes, folder: Path) -> None:
    (folder / "model_index.json").write_bytes(data)
    read_index(folder)


def read_component(data: bytes, folder: Path) -> None:
    """Load a part of a model one of whose files is the case."""
    whole, files = seeds.model_folder(), seeds.model_files()
    chosen = files[data[0] % len(files)] if data else files[0]
    shutil.copy(whole / "model_index.json", folder)
    name = chosen.relative_to(whole).parts[0]
    for path in (file for file in files if file.is_relative_to(whole / name)):
        copy = folder / path.relative_to(whole)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data[1:] if path == chosen else path.read_bytes())
    load_components(read_index(folder), [name], torch.float32, local_files_only=True)


def read_adapter(data: bytes, folder: Path) -> None:
    for name in ("vlv.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(data)
    attempt(lambda: read_about(folder))
    attempt(lambda: read_settings(folder / "adapter_config.json"))
    attempt(lambda: read_weights(folder / "adapter_model.safetensors"))


def read_checkpoint(data: bytes, folder: Path) -> None:
    for changed in ("manifest.json", "state.json"):
        for name, good in zip(
            ("manifest.json", "state.json"), (seeds.states()[0], b"{}"), strict=True
        ):
            (folder / name).write_bytes(data if name == changed else good)
        attempt(lambda: load_checkpoint(folder))


TARGETS = {
    "image": Target(seeds.images, read_image),
    "array": Target(seeds.arrays, read_array),
    "tar": Target(seeds.tars, read_tar),
    "parquet": Target(seeds.parquets, read_parquet),
    "lines": Target(seeds.lines, read_lines),
    "sheet": Target(seeds.sheets, read_sheet),
    "sidecars": Target(seeds.lines, read_sidecars),
    "embeddings": Target(seeds.embeddings, read_embeddings),
    "answer": Target(seeds.answers, read_answer),
    "model index": Target(seeds.indexes, read_model_index),
    "component": Target(seeds.components, read_component),
    "adapter": Target(seeds.adapters, read_adapter),
    "checkpoint": Target(seeds.states, read_checkpoint),
}
SHARES = {"image": 10, "tar": 4, "parquet": 4, "lines": 3}
"""How often a target comes, where more than once in each round."""


def read_source(path: Path) -> None:
    """All ways to read an archive or table: listed, as a stream, and by the filter."""
    attempt(lambda: look_at(find_records([path], columns=COLUMNS, on_damage="keep")))
    look_at(Source([path]).stream())
    measure(path)


def look_at(entries: Iterator[Record | BadRecord] | list[Record]) -> None:
    """Open every image, and read its metadata."""
    for entry in entries:
        if isinstance(entry, BadRecord):
            assert_one_line(entry.reason)
            continue
        attempt(entry.load)
        attempt(lambda entry=entry: entry.meta)
        f"{entry.id} {entry.name} {entry.caption}".encode()


def measure(path: Path) -> None:
    """As `vlv data filter` does."""
    for part in Source([path], detail="all").parts():
        for row in measure_part(part, RULES):
            assert_one_line(row["detail"] or "x")


def attempt(action: Callable[[], object]) -> None:
    """Do one of several things with a case; that it is refused does not keep others from being done."""
    try:
        action()
    except VLVError as error:
        assert_one_line(str(error))


def assert_one_line(text: str) -> None:
    assert text, "an error without a word"
    assert "\n" not in text, f"more than one line: {text!r}"
    assert len(text) < 5000, f"an error of {len(text)} characters"
    text.encode()


def run(name: str, data: bytes, folder: Path) -> bool:
    """Read a case in an empty folder; whether it was refused."""
    try:
        TARGETS[name].read(data, folder)
    except VLVError as error:
        assert_one_line(str(error))
        return True
    return False
