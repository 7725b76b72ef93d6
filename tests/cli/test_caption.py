"""`vlv caption`: outputs, resuming, what is never destroyed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Vlv, start, write_image
from vlv.data.source import find_records
from vlv.data.texts import questions_of
from vlv.jobs.caption_settings import CHECK_COLUMNS, COLUMNS
from vlv.jobs.formats import Row, read_rows
from vlv.models import placement
from vlv.models.pipeline import VLVPipeline

SHORT = ("--max-new-tokens", 5)


def rows(path: Path) -> list[Row]:
    return list(read_rows(path, COLUMNS))


@pytest.fixture
def args(tiny_folder: Path, photos: Path) -> tuple[object, ...]:
    return ("caption", photos, "--model", tiny_folder, *SHORT)


def test_to_stdout(vlv: Vlv, args: tuple[object, ...], photos: Path, tiny_folder: Path) -> None:
    result = vlv(*args)
    assert result.code == 0
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert [name for name, _ in lines] == [
        *(str(photos / f"{number}.png") for number in range(4)),
        str(photos / "more" / "4.jpg"),
    ]
    assert "done 5, skipped 0, failed 0, truncated 5" in result.err
    single = vlv("caption", photos / "1.png", "--model", tiny_folder, *SHORT)
    assert single.out.rstrip("\n") == lines[1][1], "one image: the caption and nothing else"


def test_json_lines_to_stdout(vlv: Vlv, args: tuple[object, ...]) -> None:
    result = vlv(*args, "--output", "-", "--limit", 2)
    assert [json.loads(line)["id"] for line in result.out.splitlines()] == ["0.png", "1.png"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv"])
def test_table(vlv: Vlv, args: tuple[object, ...], tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    result = vlv(*args, "--output", output, "--batch-size", 2, "--seed", 3)
    assert (result.code, result.out) == (0, "")
    table = rows(output)
    assert [list(row) for row in table] == [list(COLUMNS)] * 5
    last = table[-1]
    assert (last["id"], last["width"], last["height"]) == ("more/4.jpg", 50, 40)
    assert (last["n_tokens"], last["finish_reason"], last["seed"]) == (5, "length", 3)
    assert (last["error"], len(last["sha256"])) == (None, 64)


def test_rerun_is_a_no_op(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    vlv(*args, "-o", output)
    before = output.read_bytes()
    monkeypatch.setattr(VLVPipeline, "from_pretrained", None)  # the model is not even loaded
    result = vlv(*args, "-o", output)
    assert result.code == 0
    assert "done 0, skipped 5, failed 0" in result.err
    assert output.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv"])
def test_interrupted_run_loses_nothing(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole, output = tmp_path / f"whole-{name}", tmp_path / name
    vlv(*args, "-o", whole, "--batch-size", 2)
    describe = VLVPipeline.describe
    calls = iter([False, True])

    def interrupted(self: VLVPipeline, *rest: object, **options: object) -> object:
        if next(calls):
            raise KeyboardInterrupt
        return describe(self, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(VLVPipeline, "describe", interrupted)
        result = vlv(*args, "-o", output, "--batch-size", 2)
    assert result.code == 130
    assert "2 results are kept; the same command goes on from there" in result.err
    again = vlv(*args, "-o", output, "--batch-size", 2)
    assert again.code == 0
    assert "done 3, skipped 2" in again.err
    assert rows(output) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_killed_run_loses_nothing(
    vlv: Vlv, tiny_folder: Path, tmp_path: Path, kind: signal.Signals, code: int
) -> None:
    for number in range(60):
        write_image(tmp_path / "many" / f"{number:02d}.png", number)
    output = tmp_path / "out.jsonl"
    args = ["caption", tmp_path / "many", "--model", tiny_folder, *SHORT, "-o", output]
    args += ["--batch-size", 1]
    process = start(*args)
    deadline = time.monotonic() + 600
    while (not output.exists() or output.stat().st_size < 1500) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, kind)
    process.join()
    assert process.exitcode == code
    kept = output.read_bytes().count(b"\n")
    assert 0 < kept < 60
    result = vlv(*args[:-1], 64)
    assert f"done {60 - kept}, skipped {kept}" in result.err
    assert [row["id"] for row in rows(output)] == [f"{number:02d}.png" for number in range(60)]


def test_bad_files_are_named_and_tried_again(
    vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path
) -> None:
    good = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(good[: len(good) // 2])
    (photos / "3.png").write_bytes(b"")
    output = tmp_path / "out.jsonl"
    result = vlv(*args, "-o", output)
    assert result.code == 2
    assert f"failed: {photos / '2.png'}" in result.err
    assert f"failed: {photos / '3.png'}" in result.err
    assert "done 3, skipped 0, failed 2" in result.err
    table = {row["id"]: row for row in rows(output)}
    assert table["2.png"]["caption"] is None
    assert "cannot be decoded" in table["2.png"]["error"]
    assert "empty" in table["3.png"]["error"]
    (photos / "2.png").write_bytes(good)
    again = vlv(*args, "-o", output)
    assert again.code == 2
    assert "done 1, skipped 3, failed 1" in again.err
    assert sum(row["error"] is None for row in rows(output)) == 4


@pytest.mark.slow
def test_sidecars_resume_and_never_replace(
    vlv: Vlv, args: tuple[object, ...], photos: Path
) -> None:
    (photos / "1.txt").write_text("written by hand\n")
    result = vlv(*args, "--sidecar", ".txt")
    assert result.code == 0
    assert "done 4, skipped 1" in result.err
    assert (photos / "1.txt").read_text() == "written by hand\n"
    assert (photos / "more" / "4.txt").read_text().count("\n") == 1
    assert "done 0, skipped 5" in vlv(*args, "--sidecar", "txt").err
    vlv(*args, "--sidecar", ".txt", "--on-existing", "append")
    assert (photos / "1.txt").read_text().startswith("written by hand\n")
    assert (photos / "1.txt").read_text().count("\n") == 2
    vlv(*args, "--sidecar", ".txt", "--on-existing", "overwrite")
    assert "hand" not in (photos / "1.txt").read_text()
    assert (photos / "1.txt").read_text().count("\n") == 1


def test_sidecars_are_filled_from_the_table(
    vlv: Vlv,
    args: tuple[object, ...],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out.jsonl"
    vlv(*args, "-o", output)
    monkeypatch.setattr(VLVPipeline, "from_pretrained", None)
    assert vlv(*args, "-o", output, "--sidecar", ".txt").code == 0
    for row in rows(output):
        written = (photos / row["id"]).with_suffix(".txt").read_text()
        assert written == " ".join(row["caption"].split()) + "\n"


def test_two_images_with_one_stem(vlv: Vlv, args: tuple[object, ...], photos: Path) -> None:
    """Only they fail, and all are named."""
    write_image(photos / "1.jpg", 9)
    write_image(photos / "more" / "4.png", 9)
    result = vlv(*args, "--sidecar", ".txt")
    assert result.code == 2
    assert "done 3, skipped 0, failed 4" in result.err
    for one, other, text in (
        (photos / "1.jpg", photos / "1.png", photos / "1.txt"),
        (photos / "more" / "4.jpg", photos / "more" / "4.png", photos / "more" / "4.txt"),
    ):
        for a, b in ((one, other), (other, one)):
            assert f"failed: {a}: it would share {text} with {b}; rename one" in result.err
    assert sorted(path.name for path in photos.rglob("*.txt")) == ["0.txt", "2.txt", "3.txt"]
    (photos / "1.jpg").unlink()
    (photos / "more" / "4.png").unlink()
    assert "done 2, skipped 3, failed 0" in vlv(*args, "--sidecar", ".txt").err


def test_images_with_one_stem_fail_in_the_table_too(
    vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path
) -> None:
    write_image(photos / "1.jpg", 9)
    output = tmp_path / "out.jsonl"
    result = vlv(*args, "--sidecar", ".txt", "-o", output)
    assert (result.code, "done 4, skipped 0, failed 2" in result.err) == (2, True)
    failed = [row["id"] for row in rows(output) if row["error"] is not None]
    assert failed == ["1.jpg", "1.png"]
    dry = vlv(*args, "--sidecar", ".txt", "-o", output, "--dry-run")
    assert dry.err.count("would fail: ") == 2


@pytest.mark.parametrize("suffix", [".png", ".", ".jsonl", "a/b"])
def test_dangerous_sidecar_suffix(vlv: Vlv, args: tuple[object, ...], suffix: str) -> None:
    result = vlv(*args, "--sidecar", suffix)
    assert result.code == 1
    assert "cannot be the suffix" in result.err


def test_other_settings_are_refused(vlv: Vlv, args: tuple[object, ...], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    vlv(*args, "-o", output)
    before = output.read_bytes()
    result = vlv(*args, "-o", output, "--num-beams", 2)
    assert result.code == 1
    assert "num_beams was 1, now 2" in result.err
    assert output.read_bytes() == before
    assert vlv(*args, "-o", output, "--num-beams", 2, "--on-existing", "overwrite").code == 0
    assert vlv(*args, "-o", output, "--on-existing", "error").code == 1


def test_append_adds_a_second_caption(vlv: Vlv, args: tuple[object, ...], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    drawn = (*args, "-o", output, "--temperature", 1, "--on-existing", "append")
    vlv(*drawn, "--seed", 1)
    vlv(*drawn, "--seed", 2)
    table = rows(output)
    assert [row["seed"] for row in table] == [1] * 5 + [2] * 5
    assert [row["caption"] for row in table[:5]] != [row["caption"] for row in table[5:]]


@pytest.mark.slow
def test_drawn_captions_follow_the_seed(vlv: Vlv, args: tuple[object, ...]) -> None:
    drawn = (*args, "--temperature", 1.5)
    assert vlv(*drawn, "--seed", 1).out == vlv(*drawn, "--seed", 1).out
    assert vlv(*drawn, "--seed", 1).out != vlv(*drawn, "--seed", 2).out


@pytest.mark.slow
def test_batches_do_not_change_captions(vlv: Vlv, args: tuple[object, ...]) -> None:
    for how in ((), ("--temperature", 2)):
        assert vlv(*args, *how, "--batch-size", 1).out == vlv(*args, *how, "--batch-size", 5).out


def test_dry_run_writes_and_loads_nothing(
    vlv: Vlv, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLVPipeline, "from_pretrained", None)
    result = vlv("caption", photos, "-o", tmp_path / "out.jsonl", "--dry-run", "--no-recursive")
    assert result.code == 0
    assert len(result.out.splitlines()) == 4
    assert "4 to caption, 0 already done" in result.err
    assert not (tmp_path / "out.jsonl").exists()


def test_tar_shards_and_jsonl_lists(
    vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.make_archive(str(tmp_path / "shard"), "tar", photos)
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(f'{{"file_name": "photos/{n}.png"}}\n' for n in range(4)))
    output = tmp_path / "out.jsonl"
    args = ("caption", tmp_path / "shard.tar", listed, "--model", tiny_folder, *SHORT)
    assert vlv(*args, "-o", output).code == 0
    assert len(rows(output)) == 9
    result = vlv(*args, "--sidecar", ".txt")
    assert result.code == 1
    assert "lies in an archive" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "captions.xls"), "must end in .jsonl, .parquet, .csv"),
        (("--format", "webdataset"), "--format webdataset needs a folder"),
        (("--on-changed", "redo"), "--on-changed redo has no effect without --output"),
        (("--max-words", "0"), "max_words is 0"),
        (("--batch-size", "many"), "--batch-size is many; it must be auto, or a number"),
        (("--temperature", "0"), "temperature is 0.0"),
        (("--top-p", "2"), "top_p is 2.0"),
        (("--max-new-tokens", "0"), "must be 1 or more"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--on-existing", "perhaps"), "perhaps"),
        (("--device", "toaster"), "'toaster' cannot be used"),
    ],
)
def test_wrong_options(
    vlv: Vlv, args: tuple[object, ...], options: tuple[str, str], message: str
) -> None:
    result = vlv(*args, *options)
    assert result.code == 1
    assert message in result.err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["caption", "reconstruct", "embed"])
def test_parts_are_compiled_if_asked_for(
    vlv: Vlv,
    photos: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(placement, "why_no_compiler", lambda _: "no C++ compiler was found")
    output = tmp_path / {"caption": "out.jsonl", "reconstruct": "out"}.get(command, "z.safetensors")
    args = (command, photos, "--model", tiny_folder, "-o", output, "--device", "cpu")
    result = vlv(*args, "--compile")
    assert result.code == 1
    assert "no C++ compiler was found; leave --compile out" in result.err
    assert vlv(*args, "--limit", 1).code == 0


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (("--dtype", "bfloat16"), "dtype was float32, now bfloat16"),
        (("--llm-bits", "8"), "llm_bits was None, now 8"),
    ],
)
def test_a_table_goes_on_in_the_same_precision_only(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, option: tuple[str, str], what: str
) -> None:
    output = ("--output", tmp_path / "out.jsonl", "--device", "cpu")
    assert vlv(*args, *output, "--limit", 1).code == 0
    result = vlv(*args, *output, *option)
    assert result.code == 1
    assert what in result.err
    assert len(rows(tmp_path / "out.jsonl")) == 1


# Words, formats, changed images ------------------------------------------------------------------


@pytest.mark.slow
def test_words_around_captions(
    vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path
) -> None:
    plain, output = tmp_path / "plain.jsonl", tmp_path / "out.jsonl"
    vlv(*args, "-o", plain)
    words = ("--prefix", "a photo, ", "--suffix", " #7", "--trigger", "sks", "--max-words", 2)
    assert vlv(*args, "-o", output, "--sidecar", ".txt", *words).code == 0
    for before, row in zip(rows(plain), rows(output), strict=True):
        text = row["caption"]
        assert text.startswith("sks, a photo, ")
        assert text.endswith(" #7")
        inner = text.removeprefix("sks, a photo, ").removesuffix(" #7")
        assert len(inner.split()) <= 2
        assert before["caption"].startswith(inner.rstrip("."))
        assert (photos / row["id"]).with_suffix(".txt").read_text() == " ".join(text.split()) + "\n"
    result = vlv(*args, "-o", output, *words[:-1], 3)
    assert "wording.max_words was 2, now 3" in result.err


def test_a_csv_table_is_read_back_by_the_standard_library(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path
) -> None:
    vlv(*args, "-o", tmp_path / "out.jsonl")
    vlv(*args, "-o", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    expected = rows(tmp_path / "out.jsonl")
    assert [row["caption"] for row in found] == [row["caption"] for row in expected]
    assert [int(row["width"]) for row in found] == [row["width"] for row in expected]


def test_webdataset(vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path) -> None:
    (photos / "2.png").write_bytes(b"broken")
    (photos / "1.json").write_text('{"question": "red?", "answer": "yes", "caption": "old"}')
    folder = tmp_path / "out"
    result = vlv(*args, "-o", folder, "--format", "webdataset")
    assert (result.code, "done 4, skipped 0, failed 1" in result.err) == (2, True)
    captions = {row["id"]: row["caption"] for row in rows(folder / "captions.jsonl")}
    records = find_records([str(folder / "shard-00000.tar")])
    assert [record.id for record in records] == ["0", "1", "3", "more/4"]
    for record, name in zip(records, ("0.png", "1.png", "3.png", "more/4.jpg"), strict=True):
        assert record.caption == captions[name]
        assert record.open() == (photos / name).read_bytes()
        assert record.meta is not None
        assert record.meta["file_name"] == str(photos / name)
        asked = [(text.instruction, text.answer) for text in questions_of(name, record.meta)]
        assert asked == ([("red?", "yes")] if name == "1.png" else []), "what is known stays"
    before = (folder / "shard-00000.tar").stat().st_mtime_ns
    write_image(photos / "2.png", 2)
    assert vlv(*args, "-o", folder, "--format", "webdataset").code == 0
    assert len(find_records([str(folder / "shard-00000.tar")])) == 5
    assert (folder / "shard-00000.tar").stat().st_mtime_ns > before


def test_imagefolder(vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path) -> None:
    assert vlv(*args, "-o", photos, "--format", "imagefolder").code == 0
    captions = {row["id"]: row["caption"] for row in rows(photos / "captions.jsonl")}
    found = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    assert found == [{"file_name": name, "text": text} for name, text in captions.items()]
    assert "done 0, skipped 5" in vlv(*args, "-o", photos, "--format", "imagefolder").err
    elsewhere = vlv(*args, "-o", tmp_path / "empty", "--format", "imagefolder")
    assert (elsewhere.code, "is no file below" in elsewhere.err) == (1, True)
    (photos / "captions.jsonl").unlink()
    result = vlv(*args, "-o", photos, "--format", "imagefolder")
    assert (result.code, "was not written by vlv and is kept" in result.err) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv"])
def test_changed_images(
    vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path, name: str
) -> None:
    output = tmp_path / name
    to = (*args, "-o", output, "--sidecar", ".txt")
    vlv(*to)
    first = {row["id"]: row for row in rows(output)}
    (photos / "3.txt").write_text("by hand\n")
    for number in (1, 3):
        write_image(photos / f"{number}.png", 100 + number)
    os.utime(photos / "2.png", ns=(1, 1))  # another time, the same image
    kept = vlv(*to)
    assert (kept.code, {row["id"]: row for row in rows(output)}) == (0, first)
    assert "skipped 5, failed 0, truncated 0, changed 2 (kept as they were" in kept.err
    redone = vlv(*to, "--on-changed", "redo")
    assert "done 2, skipped 3, failed 0" in redone.err
    assert "changed 2 (done again)" in redone.err
    again = {row["id"]: row for row in rows(output)}
    assert len(rows(output)) == 5
    assert {id for id in first if first[id] != again[id]} == {"1.png", "3.png"}
    assert again["1.png"]["sha256"] != first["1.png"]["sha256"]
    new = " ".join(again["1.png"]["caption"].split()) + "\n"
    assert (photos / "1.txt").read_text() == new
    assert (photos / "3.txt").read_text() == "by hand\n", "words of a person are kept"
    assert ", changed" not in vlv(*to, "--on-changed", "redo").err


def test_automatic_batch_size(vlv: Vlv, args: tuple[object, ...]) -> None:
    assert vlv(*args, "--batch-size", "auto").out == vlv(*args).out


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    vlv: Vlv, args: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sizes = vlv(*args).out, []
    describe = VLVPipeline.describe

    def small(self: VLVPipeline, *, z: torch.Tensor, **options: object) -> object:
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError
        return describe(self, z=z, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(VLVPipeline, "describe", small)
    result = vlv(*args, "--batch-size", 4)
    assert (result.code, result.out) == (0, expected)
    assert "note: 4 images do not fit into memory; going on with 2" in result.err
    assert sizes == [4, 2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv"])
def test_verified_captions(vlv: Vlv, args: tuple[object, ...], tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    verified = (*args, "--verify", 3, "-o", output)
    result = vlv(*verified)
    assert result.code == 0, result.err
    assert "verified: 3.0 candidates for each caption" in result.err
    table = list(read_rows(output, COLUMNS | CHECK_COLUMNS))
    assert [row["n_candidates"] for row in table] == [3] * 5
    assert all(0 <= row["score"] <= 1 for row in table)
    plain = [line.split("\t")[1] for line in vlv(*args).out.splitlines()]
    assert [row["caption"] for row in table] != plain, "not always the likeliest caption wins"
    again = vlv(*verified, "--batch-size", 1)
    assert "done 0, skipped 5" in again.err
    other = vlv(*args, "-o", output)
    assert other.code == 1
    assert "verify was 3, now" in other.err


def test_embeddings_alone_cannot_be_verified(
    vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    made = tmp_path / "z.safetensors"
    assert vlv("embed", photos, "--model", tiny_folder, "-o", made).code == 0
    result = vlv("caption", made, "--model", tiny_folder, "--verify", 2)
    assert result.code == 1
    assert "is a caption embedding; verification compares captions with images" in result.err
    assert "enough has no effect without verify" in vlv("caption", photos, "--enough", 1).err
    assert "candidates is 1; choose between 2 and 1000" in vlv("caption", photos, "--verify", 1).err


# --- words ----------------------------------------------------------------------------------------


def test_included_and_excluded_words(
    vlv: Vlv, photos: Path, instructed_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    args = ("caption", photos, "--model", instructed_folder, "--max-new-tokens", 12)
    args = (*args, "-o", output, "--exclude", "red", "--include", "cube", "--include")
    result = vlv(*args, "incomprehensibility", "--max-words", 2)
    assert result.code == 0
    assert "5 captions lack a word of --include" in result.err
    table = [json.loads(line) for line in output.read_text().splitlines()]
    assert not any("red" in row["caption"].lower().split() for row in table)
    assert all("incomprehensibility" in row["missing_words"] for row in table), "as it was cut"
    before = output.read_bytes()
    other = vlv(*args, "blue")
    assert other.code == 1
    assert "include" in other.err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--include", "red", "--exclude", "Red"), "'red' is to be included and 'Red' to be exclu"),
        (("--exclude", " "), "--exclude holds ''"),
        (("--exclude", "sks", "--trigger", "SKS"), "--trigger holds 'sks'"),
        (("--include", "x", "--engine", "vllm", "--engine-url", "http://127.0.0.1:1/v1"), "--engine vllm includes and"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense(
    vlv: Vlv, photos: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = vlv(
        "caption", photos, "--model", tmp_path / "none", "-o", tmp_path / "o.csv", *options
    )
    assert result.code == 1
    assert message in result.err
    assert not list(tmp_path.glob("o.*"))


def test_captions_by_a_schema(vlv: Vlv, args: tuple[object, ...], tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason='needs llguidance: pip install "vlv[json]"')
    file, output = tmp_path / "schema.json", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"enum": ["cube", "cone"]}))
    args = (*args, "--max-new-tokens", 20, "--json-schema", file, "-o", output)
    assert vlv(*args).code == 0
    assert all(json.loads(row["caption"]) in ("cube", "cone") for row in rows(output))
    with_words = vlv(*args, "--trigger", "sks")
    assert with_words.code == 1
    assert "a caption by a schema is JSON" in with_words.err
    file.write_text('{"type": "objekt"}')
    other = vlv(*args)
    assert other.code == 1
    assert "Invalid type: objekt" in other.err
