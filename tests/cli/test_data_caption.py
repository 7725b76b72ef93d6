"""`vlv data caption`: captions of a teacher, what is paid, resumed, refused and named."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.conftest import Vlv, start, write_image
from tests.data.files import quadrants, rotated
from tests.endpoint.server import ScriptedServer, always, faults, images_of, text_of
from vlv.data.records import Columns
from vlv.data.shards import TarShardWriter
from vlv.data.source import find_records
from vlv.jobs.formats import read_rows

QUICK = ("--set", "backoff=0.001", "--set", "max_backoff=0.01")


def teacher(url: str, folder: Path | str, output: Path, *more: object) -> tuple[object, ...]:
    asked = ("--endpoint", url, "--model", "painter", *QUICK)
    return ("data", "caption", folder, "--output", output, *asked, *more)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(output.glob("*.parquet")) for row in read_rows(path)]


def files_of(output: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(output.iterdir()) if path.is_file()]
    return {path.name: path.read_bytes() for path in paths}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for number in range(40):
        write_image(tmp_path / "many" / f"{number:03d}.png", number, (24, 20))
    return tmp_path / "many"


def test_stage_2_reads_what_is_written(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    with ScriptedServer(always("ok")) as server:
        result = vlv(
            *teacher(server.url, photos, tmp_path / "out", "--price-in", 1, "--price-out", 10)
        )
        assert (result.code, server.requests) == (0, 5)
        assert "done 5, skipped 0, failed 0" in result.err
        assert "5 requests, 0 answers known before, 500 + 100 tokens, 0.0015 USD" in result.err
    records = find_records([str(tmp_path / "out" / "*.parquet")])
    originals = find_records([str(photos)])
    assert [record.id for record in records] == [record.id for record in originals]
    for record, original in zip(records, originals, strict=True):
        assert record.open() == original.open()
        assert record.caption is not None
        assert record.caption.endswith(".")
    row = rows_of(tmp_path / "out")[-1]
    assert list(row)[:4] == ["image", "id", "file_name", "caption"]
    assert (row["id"], row["width"], row["height"], row["n_tokens"]) == ("more/4.jpg", 50, 40, 20)
    assert (row["finish_reason"], row["model"], row["prompt_style"]) == (
        "stop",
        "painter",
        "exhaustive",
    )
    assert (row["error"], row["tries"], len(row["sha256"])) == (None, 1, 64)


def test_the_same_command_again_asks_nothing(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    with ScriptedServer(always("ok")) as server:
        args = teacher(server.url, photos, tmp_path / "out")
        vlv(*args)
        before = files_of(tmp_path / "out")
        result = vlv(*args)
        assert (result.code, server.requests) == (0, 5)
        assert "done 0, skipped 5" in result.err
        assert files_of(tmp_path / "out") == before
        assert vlv(*args, "--on-existing", "error").code == 1
        other = vlv(*args, "--prompt", "short")
        assert "was made with other settings (prompts.exhaustive was" in other.err
        longer = vlv(*args, "--max-tokens", 9)
        assert "max_tokens was 512, now 9" in longer.err
        again = vlv(*args, "--on-existing", "overwrite")
        assert "0 requests, 5 answers known before" in again.err, "paid answers are kept"
        assert "0.0000 USD (0.0000 USD over all runs)" in again.err
        assert server.requests == 5
        assert vlv(*args, "--prompt", "short", "--on-existing", "overwrite").code == 0
        assert server.requests == 10


def test_prompts_with_fields_and_several_captions(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    (photos / "0.txt").write_text("Grandma's garden")
    (photos / "0.json").write_text(json.dumps({"tags": ["tree", "sun"]}))
    (tmp_path / "look.md").write_text("Look at {file_name}, known as {alt|nothing}: {tags|none}.")
    with ScriptedServer(always("ok")) as server:
        result = vlv(
            *teacher(server.url, photos, tmp_path / "out"),
            *("--prompt", f"@{tmp_path / 'look.md'}", "--prompt", "tags", "--format", "jsonl"),
        )
        assert (result.code, server.requests) == (0, 10)
        texts = [text_of(body) for body in server.bodies]
    assert "Look at 0.png, known as Grandma's garden: tree, sun." in texts
    assert "Look at 4.jpg, known as nothing: none." in texts
    table = lines(tmp_path / "out" / "captions.jsonl")
    assert [row["id"] for row in table] == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "more/4.jpg",
    ]
    assert all(row["caption"] != row["caption_tags"] for row in table)
    assert table[0]["prompt_style"] == "look"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("What about {artist}?", "no record has the field 'artist' of the prompt own"),
        ("What about {alt.__class__}?", "holds '{alt.__class__}', which is no field"),
        ("exhaustif", "there is no prompt 'exhaustif'"),
        ("@nowhere.txt", "nowhere.txt cannot be read"),
    ],
)
def test_bad_prompts(vlv: Vlv, photos: Path, tmp_path: Path, prompt: str, words: str) -> None:
    with ScriptedServer(always("ok")) as server:
        result = vlv(*teacher(server.url, photos, tmp_path / "out", "--prompt", prompt))
        assert (result.code, server.requests) == (1, 0)
    assert words in result.err
    assert not (tmp_path / "out").exists()


def test_a_record_that_lacks_a_field_is_named(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    (photos / "1.txt").write_text("a name")
    with ScriptedServer(always("ok")) as server:
        result = vlv(*teacher(server.url, photos, tmp_path / "out", "--prompt", "It is {caption}."))
        assert (result.code, server.requests) == (2, 1)
    assert f"failed: {photos / '0.png'}: it has no field 'caption'" in result.err


def test_an_embedding_is_no_image_to_send(
    vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    z = tmp_path / "z.safetensors"
    assert vlv("embed", photos, "--limit", 2, "--model", tiny_folder, "-o", z).code == 0
    with ScriptedServer(always("ok")) as server:
        result = vlv(*teacher(server.url, z, tmp_path / "out"))
        assert (result.code, server.requests) == (2, 0)
    assert result.err.count("caption embedding, from which no image can be read") == 2


def test_images_are_sent_small_and_upright(vlv: Vlv, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(rotated(quadrants(480, 320), 6, "JPEG", quality=95))
    with ScriptedServer(always("ok")) as server:
        vlv(*teacher(server.url, tmp_path / "in", tmp_path / "out", "--max-side", 96))
        (sent,) = images_of(server.bodies[0])
    image = Image.open(BytesIO(sent))
    assert (image.format, image.size) == ("JPEG", (96, 64))
    assert not image.getexif()
    red, green, blue = (image.getpixel(xy) for xy in ((10, 10), (80, 10), (10, 55)))
    assert max(range(3), key=lambda c: red[c]) == 0  # type: ignore[index]
    assert max(range(3), key=lambda c: green[c]) == 1  # type: ignore[index]
    assert max(range(3), key=lambda c: blue[c]) == 2  # type: ignore[index]


@pytest.mark.parametrize(
    ("trouble", "reminder"),
    [
        ("empty", "Answer with words."),
        ("refusal", "describe only what is visible"),
        ("sorry", "describe only what is visible"),
        ("repeat", "do not repeat yourself"),
        ("length", "at most 60 words"),
        ("german", "with the code en"),
        ("say Hello", "Use at least 3 words."),
        ("say " + "word and " * 31 + "a b c d e f g h i j", "Use at most 60 words."),
    ],
)
def test_an_answer_that_is_no_caption_is_asked_for_again(
    vlv: Vlv, tmp_path: Path, trouble: str, reminder: str
) -> None:
    write_image(tmp_path / "in" / "a.png")

    def once(body: dict[str, Any], times: int) -> str:
        return "ok" if reminder in text_of(body) else trouble

    limits = ("--min-words", 3, "--max-words", 60, "--temperature", 0)
    with ScriptedServer(once) as server:
        assert vlv(*teacher(server.url, tmp_path / "in", tmp_path / "a", *limits)).code == 0
        first, second = server.bodies
        assert (first["temperature"], second["temperature"], second["seed"]) == (0, 0.7, 1)
        assert "seed" not in first
    assert rows_of(tmp_path / "a")[0]["tries"] == 2
    with ScriptedServer(always(trouble)) as server:
        result = vlv(*teacher(server.url, tmp_path / "in", tmp_path / "b", *limits))
        assert (result.code, server.requests) == (2, 2)
    assert f"failed: {tmp_path / 'in' / 'a.png'}: the answer is no caption, it " in result.err
    assert "(2 tries)" in result.err
    assert not rows_of(tmp_path / "b")


def test_retry_failed_asks_only_for_those(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    good = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(good[:100])
    bad_once = faults({"sorry": 0.3, "400": 0.3}, seed=1)
    with ScriptedServer(bad_once) as server:
        args = teacher(server.url, photos, tmp_path / "out", "--tries", 1, "--format", "jsonl")
        first = vlv(*args)
        assert first.code == 2
        assert f"failed: {photos / '2.png'}: cannot be decoded" in first.err
        failed = [row["id"] for row in lines(tmp_path / "out" / "captions.jsonl") if row["error"]]
        assert 1 < len(failed) < 5
        again = vlv(*args)
        assert (again.code, server.requests) == (0, 4), "without --retry-failed nothing is asked"
        server.script = always("ok")
        (photos / "2.png").write_bytes(good)
        last = vlv(*args, "--retry-failed")
        assert f"done {len(failed)}, skipped {5 - len(failed)}, failed 0" in last.err
        assert server.requests == 4 + len(failed)
    assert all(row["caption"] for row in lines(tmp_path / "out" / "captions.jsonl"))


def test_a_wrong_key_stops_at_once(
    vlv: Vlv, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "abc-secret")
    with ScriptedServer(always("401")) as server:
        args = teacher(server.url, photos, tmp_path / "out", "--key-env", "TEACHER_KEY")
        result = vlv(*args)
        assert (result.code, server.keys) == (1, {"Bearer abc-secret"})
        assert "does not accept the key (HTTP 401)" in result.err
        server.script = always("ok")
        assert vlv(*args).code == 0
    monkeypatch.delenv("TEACHER_KEY")
    missing = vlv(*teacher(server.url, photos, tmp_path / "other", "--key-env", "TEACHER_KEY"))
    assert "TEACHER_KEY, which should hold the key, is not set" in missing.err
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"abc-secret" not in path.read_bytes()


def test_nobody_there_and_then_somebody(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    with ScriptedServer(always("ok")) as server:
        url = server.url
    result = vlv(*teacher(url, photos, tmp_path / "out", "--set", "retries=1"))
    assert result.code == 1
    assert "is the server running" in result.err
    assert not files_of(tmp_path / "out")
    with ScriptedServer(always("ok")) as server:
        assert vlv(*teacher(server.url, photos, tmp_path / "out")).code == 0


def test_a_budget_stops_cleanly(vlv: Vlv, many: Path, tmp_path: Path) -> None:
    with ScriptedServer(always("ok")) as server:
        args = teacher(
            server.url, many, tmp_path / "out", "--format", "parquet", "--shard-size", 16
        )
        result = vlv(*args, "--max-requests", 20)
        assert (result.code, server.requests) == (2, 20)
        assert "the budget of 20 requests is used up" in result.err
        assert "20 images are left" in result.err
        assert len(rows_of(tmp_path / "out")) == 20
        assert vlv(*args, "--max-requests", 20).code == 2
        assert server.requests == 20, "the budget holds over all runs"
        assert vlv(*args).code == 0
        assert server.requests == 40
    assert len(rows_of(tmp_path / "out")) == 40


@pytest.mark.slow
def test_faults_end_in_the_same_files_whatever_the_order(
    vlv: Vlv, many: Path, tmp_path: Path
) -> None:
    shares = {"500": 0.1, "hang": 0.02, "malformed": 0.05, "reset": 0.02, "429 0": 0.05}
    shares |= {"sorry": 0.03, "400": 0.02, "slow": 0.1}
    outputs = []
    for number, concurrency in enumerate((1, 16)):
        with ScriptedServer(faults(shares), slow=0.02) as server:
            output = tmp_path / f"out{number}"
            result = vlv(
                *teacher(server.url, many, output, "--concurrency", concurrency),
                *("--set", "timeout=1", "--set", "retries=20", "--format", "parquet"),
                *("--format", "jsonl", "--shard-size", 16),
            )
            assert result.code in {0, 2}
            assert set(server.delivered.values()) <= {1}
        table = lines(output / "captions.jsonl")
        assert [row["id"] for row in table] == [f"{n:03d}.png" for n in range(40)]
        assert all((row["caption"] is None) == (row["error"] is not None) for row in table)
        outputs.append(files_of(output))
    assert outputs[0] == outputs[1]
    assert list(outputs[0])[:3] == ["00000.parquet", "00000_stats.json", "00001.parquet"]


@pytest.mark.slow
def test_killed_five_times_at_random_and_resumed(vlv: Vlv, many: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    with ScriptedServer(always("slow"), slow=0.03) as server:
        more = ("--concurrency", 2, "--shard-size", 7, "--format", "parquet", "--format", "jsonl")
        vlv(*teacher(server.url, many, tmp_path / "whole", *more))
        server.delivered.clear()
        server.requests = 0
        args = teacher(server.url, many, tmp_path / "out", *more)
        killed = 0
        for number in range(5):
            process = start(*args)
            assert process.pid is not None
            goal = server.requests + draw.randint(2, 7)
            while server.requests < goal and process.is_alive():
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL if number % 2 else signal.SIGTERM)
            process.join()
            killed += process.exitcode != 0
        result = vlv(*args)
        assert killed == 5
        assert result.code == 0
        assert 40 <= server.requests <= 40 + 5 * 2, "at most those in flight are asked twice"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_a_killed_run_left_is_no_obstacle_and_goes(
    vlv: Vlv, photos: Path, tmp_path: Path
) -> None:
    """Killed before its settings were written, and while a file was."""
    output = tmp_path / "out"
    with ScriptedServer(always("ok")) as server:
        assert vlv(*teacher(server.url, photos, output)).code == 0
        whole = files_of(output)
        for path in (*output.glob("*.*"), output / "state" / "settings.json"):
            path.unlink(missing_ok=True)
        assert (output / "state").is_dir()
        assert vlv(*teacher(server.url, photos, output)).code == 0
        (output / ".0123456789ab.vlv-tmp").write_bytes(b"half")
        assert vlv(*teacher(server.url, photos, output)).code == 0
    assert files_of(output) == whole
    (output / "state" / "settings.json").unlink()
    result = vlv(*teacher(server.url, photos, output))
    assert "exists and holds no captions of vlv" in result.err


def test_a_full_disk_stops_with_a_sentence(
    vlv: Vlv, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "00001.parquet":
            raise OSError(28, "No space left on device")
        return real(self, target)

    with ScriptedServer(always("ok")) as server:
        args = teacher(server.url, many, tmp_path / "out", "--shard-size", 10)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            result = vlv(*args)
        assert result.code == 1
        assert "00001.parquet cannot be written (No space left on device)" in result.err
        assert not (tmp_path / "out" / "00001.parquet").exists()
        assert vlv(*args).code == 0
        assert server.requests <= 40 + 16, "at most those in flight are asked twice"
    assert len(rows_of(tmp_path / "out")) == 40


def test_other_formats(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    (photos / "1.txt").write_text("by hand\n")
    formats = (
        "--format",
        "txt",
        "--format",
        "imagefolder",
        "--format",
        "parquet",
        "--images",
        "path",
    )
    with ScriptedServer(always("ok")) as server:
        args = teacher(server.url, photos, tmp_path / "out", "--prompt", "short", *formats)
        assert vlv(*args).code == 0
    rows = rows_of(tmp_path / "out")
    assert [row["image"] for row in rows][-1] == "../photos/more/4.jpg"
    assert (photos / "1.txt").read_text() == "by hand\n", "what is there is not touched"
    assert (photos / "more" / "4.txt").read_text() == rows[-1]["caption"] + "\n"
    table = lines(photos / "metadata.jsonl")
    assert table[-1] == {"file_name": "more/4.jpg", "text": rows[-1]["caption"]}
    table_file = [str(tmp_path / "out" / "00000.parquet")]
    records = find_records(table_file, columns=Columns(image_root=str(photos)))
    assert [record.load().size for record in records] == [(32, 32)] * 4 + [(50, 40)]
    other = vlv(*teacher(server.url, photos, tmp_path / "other", "--format", "imagefolder"))
    assert "metadata.jsonl exists" in other.err


def test_tar_shards_get_a_file_beside_them(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    with TarShardWriter(tmp_path / "tars") as writer:
        tar = writer.path
        for number in range(3):
            writer.write(f"k{number}", {"png": (photos / f"{number}.png").read_bytes()})
    before = tar.read_bytes()
    with ScriptedServer(always("ok")) as server:
        args = teacher(server.url, tar, tmp_path / "out", "--format", "beside-tars")
        assert vlv(*args).code == 0
    table = lines(tar.with_suffix(".captions.jsonl"))
    assert [row["__key__"] for row in table] == ["k0", "k1", "k2"]
    assert all(row["caption"] for row in table)
    assert tar.read_bytes() == before
    wrong = vlv(*teacher(server.url, photos, tmp_path / "o", "--format", "beside-tars"))
    assert "lies in no tar shard" in wrong.err


def test_dry_run_sends_and_writes_nothing(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    args = teacher("http://127.0.0.1:1/v1", photos, tmp_path / "out", "--price-in", 2)
    result = vlv(*args, "--prompt", "What is in {file_name}?", "--dry-run", "--max-tokens", 100)
    assert result.code == 0
    assert "[own]\nWhat is in 0.png?" in result.out
    assert "5 images, 1 prompts; nothing is sent" in result.err
    assert "at most about 5525 tokens, 0.01 USD" in result.err
    assert not (tmp_path / "out").exists()


def test_options_without_effect_are_refused(vlv: Vlv, photos: Path, tmp_path: Path) -> None:
    base = ("data", "caption", photos, "-o", tmp_path / "out")
    for options, words in (
        (("--max-usd", 3), "--max-usd has no effect without --endpoint"),
        (("--set", "timeout=3"), "--set has no effect without --endpoint"),
        (("--prompt", "short"), "--prompt has no effect on a model of vlv"),
        (("--endpoint", "http://127.0.0.1:1/v1"), "name the endpoint's model"),
        (("--endpoint", "http://127.0.0.1:1/v1", "--vlm", "x"), "two teachers"),
        (("--format", "xls"), "there is no format 'xls'"),
        (("--language", "xx"), "the language 'xx' is not recognised"),
    ):
        result = vlv(*base, *options)
        assert result.code == 1
        assert words in result.err
    odd = vlv(*teacher("http://127.0.0.1:1/v1", photos, tmp_path / "out", "--set", "tempo=3"))
    assert "--set tempo=3: name one of" in odd.err


def test_a_model_of_vlv(vlv: Vlv, photos: Path, tmp_path: Path, tiny_folder: Path) -> None:
    args = ("data", "caption", photos, "-o", tmp_path / "out", "--model", tiny_folder)
    more = ("--max-tokens", 5, "--language", "any", "--batch-size", 2, "--format", "jsonl")
    result = vlv(*args, *more)
    assert result.code == 2, "a random model never ends its captions"
    assert "it was cut off at the token limit (2 tries)" in result.err
    table = lines(tmp_path / "out" / "captions.jsonl")
    assert [row["tries"] for row in table] == [2] * 5
