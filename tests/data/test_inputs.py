"""What the data path reads beside files and folders: bare pixels, named columns, URLs, commands, datasets."""

import hashlib
import io
import json
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data import files, loading
from vlv.data.images import load_bytes
from vlv.data.records import GUESSED, BadRecord, Columns, Record
from vlv.data.shards import TarShardWriter
from vlv.data.source import Source, find_records
from vlv.errors import DataError, ImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 24, 24), dtype=np.uint8)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    return files.encode(Image.fromarray(pixels.transpose(1, 2, 0)), "PNG")


def pixels_of(record: Record | BadRecord) -> np.ndarray:
    assert isinstance(record, Record), record.reason
    return np.asarray(record.load()).transpose(2, 0, 1)


def streamed(*inputs: object, columns: Columns = GUESSED) -> list[Record | BadRecord]:
    return list(Source([str(text) for text in inputs], columns).stream())


# The bytes of an image


@pytest.mark.parametrize(
    "data",
    [
        png(PIXELS),
        PIXELS.tobytes(),
        saved(PIXELS),
        saved(PIXELS.transpose(1, 2, 0)),
        saved(np.asfortranarray(PIXELS)),
        files.encode(Image.fromarray(PIXELS.transpose(1, 2, 0)), "BMP"),
    ],
)
def test_one_image_in_many_forms(data):
    assert np.array_equal(np.asarray(load_bytes(data, raw_pixels=True)).transpose(2, 0, 1), PIXELS)


def test_the_authors_size_of_pixels():
    pixels = np.zeros((3, 384, 384), np.uint8)
    pixels[0] = 66  # "BMBMBM ...": no bitmap, for its length is not what such a header would say
    pixels[0, :, 1::2] = 77
    assert load_bytes(pixels.tobytes(), raw_pixels=True).size == (384, 384)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"rubbish!!!!!", "no image of a format"),
        (PIXELS.tobytes()[:-1], "no image of a format"),
        (saved(PIXELS.astype(np.float32)), r"the array is float32 \(3, 24, 24\)"),
        (saved(PIXELS[0]), r"the array is uint8 \(24, 24\)"),
        (saved(PIXELS)[:-5], "the array cannot be read"),
        (saved(np.array([{}], dtype=object)), "the array cannot be read"),
        (b"\xff\xd8\xff" + bytes(3 * 24 * 24 - 3), "n"),  # a broken JPEG is never taken for pixels
        (np.zeros((3, 8000, 8000), np.uint8).tobytes(), "exceeds the limit"),
    ],
)
def test_bytes_that_are_no_image(data, message):
    with pytest.raises(ImageError, match=message):
        load_bytes(data, raw_pixels=True)


# Parquet


def write_parquet(path: Path, column: str = "image", rows: int = 10, **options) -> Path:
    images = [np.full((3, 16, 16), i, np.uint8).tobytes() for i in range(rows)]
    table = pa.table({column: images, "caption": [f"about {i}" for i in range(rows)]})
    pq.write_table(table, path, row_group_size=4, **options)
    return path


def test_the_authors_layout(tmp_path):
    path = write_parquet(tmp_path / "train-00000.parquet")
    listed, passing = find_records([path]), streamed(path)
    for number, (one, other) in enumerate(zip(listed, passing, strict=True)):
        assert np.unique(pixels_of(one)) == np.unique(pixels_of(other)) == number
        assert one.caption == other.caption == f"about {number}"
        assert other.id == f"{path}/{one.id}"


@pytest.mark.parametrize("kind", ["struct", "files", "arrays"])
def test_the_forms_of_a_column(tmp_path, kind):
    data = {"struct": {"bytes": png(PIXELS), "path": None}, "files": png(PIXELS)}
    pq.write_table(pa.table({"image": [data.get(kind, saved(PIXELS))]}), tmp_path / "a.parquet")
    for records in (find_records([tmp_path / "a.parquet"]), streamed(tmp_path / "a.parquet")):
        assert np.array_equal(pixels_of(records[0]), PIXELS)


def test_columns_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    columns = Columns(image="pic", caption="long")
    table = {"image": [b"no"], "pic": [png(PIXELS)], "caption": ["short"], "long": ["the long one"]}
    pq.write_table(pa.table(table), path)
    for records in (find_records([path], columns=columns), streamed(path, columns=columns)):
        assert records[0].caption == "the long one"
        assert np.array_equal(pixels_of(records[0]), PIXELS)
    with pytest.raises(DataError, match="there is no column img; it has image, pic, caption, long"):
        find_records([path], columns=Columns(image="img"))
    (bad,) = streamed(path, columns=Columns(image="img"))
    assert isinstance(bad, BadRecord)


def test_fields_of_jsonl_and_tars_by_name(tmp_path):
    (tmp_path / "p.png").write_bytes(png(PIXELS))
    (tmp_path / "a.jsonl").write_text('{"pic": "p.png", "image": "q.png", "long": "yes"}\n')
    (record,) = find_records([tmp_path / "a.jsonl"], columns=Columns(image="pic", caption="long"))
    assert (record.caption, record.source) == ("yes", tmp_path / "p.png")
    with TarShardWriter(tmp_path) as writer:
        writer.write("a", {"png": png(PIXELS), "txt": "short", "long": "in a member"})
        writer.write("b", {"png": png(PIXELS), "txt": "short", "json": {"long": "in a field"}})
    tar = tmp_path / "shard-00000.tar"
    for records in (
        find_records([tar], columns=Columns(caption="long")),
        streamed(tar, columns=Columns(caption="long")),
    ):
        assert [record.caption for record in records] == ["in a member", "in a field"]


def test_a_missing_cell_is_one_bad_record(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(PIXELS), None, png(PIXELS)]}), path)
    listed = loading.listed(find_records([path]), 2, 8, seed=0, max_bad_share=1)
    assert len(next(listed)["ids"]) == 2
    passing = loading.streamed(
        Source([path]).shards(), 2, 8, seed=0, max_bad_share=1, shuffle=False
    )
    assert next(passing)["ids"] == [f"{path}/00000-000000", f"{path}/00000-000002"]
    (bad,) = passing.quarantine.bad.values()
    assert bad.reason.endswith("row group 0, row 1: the cell holds no image bytes")


def test_a_truncated_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        find_records([path])
    loader = loading.streamed(Source([tmp_path]).shards(), 10, 8, seed=0, max_bad_share=1)
    assert {name.split("/")[-2] for name in next(loader)["ids"]} == {"b.parquet"}
    next(loader)
    assert list(loader.quarantine.bad) == [str(path)]


def test_a_parquet_that_is_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [PIXELS.tobytes()] * 200})
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 3000] = bytes(3000)
    path.write_bytes(bytes(content))
    listed = loading.listed(find_records([path]), 4, 16, seed=0, max_bad_share=1)
    for _ in range(100):
        next(listed)
    assert listed.quarantine.bad
    items = streamed(path)
    assert len(items) > 4
    assert all(isinstance(item, Record) for item in items[:4])


# Hashes


def test_a_wrong_hash_is_a_bad_record(tmp_path):
    lines = []
    for number in range(4):
        data = files.noise_png(number)
        (tmp_path / f"{number}.png").write_bytes(data)
        sha256 = hashlib.sha256(data if number != 2 else b"another").hexdigest()
        lines.append({"file_name": f"{number}.png", "sha256": sha256.upper() if number else sha256})
    lines[3].pop("sha256")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = find_records([tmp_path / "a.jsonl"], columns=Columns(sha256="sha256"))
    loader = loading.listed(records, 2, 8, seed=0, max_bad_share=1)
    seen = {name for _ in range(8) for name in next(loader)["ids"]}
    assert seen == {"0.png", "1.png"}
    for name in ("2.png", "3.png"):
        reason = loader.quarantine.bad[name].reason
        assert reason.endswith("the SHA-256 of the image is not the one that the index states")
    assert len(find_records([tmp_path / "a.jsonl"])) == 4


def test_hashes_in_streams(tmp_path):
    data = [png(PIXELS), files.noise_png(1)]
    sha = [hashlib.sha256(data[0]).hexdigest(), "0" * 64]
    pq.write_table(pa.table({"image": data, "sum": sha}), tmp_path / "a.parquet")
    with TarShardWriter(tmp_path) as writer:
        for key, value, digest in zip("ab", data, sha, strict=True):
            writer.write(key, {"png": value, "json": {"sum": digest}})
    for name in ("a.parquet", "shard-00000.tar"):
        good, bad = streamed(tmp_path / name, columns=Columns(sha256="sum"))
        assert np.array_equal(pixels_of(good), PIXELS)
        with pytest.raises(ImageError, match="the SHA-256 of the image is not the one"):
            pixels_of(bad)


# Remote


@pytest.fixture
def memory(tmp_path):
    """A tar, and the authors' layout of Parquet, in fsspec's memory."""
    with TarShardWriter(tmp_path) as writer:
        for key in "abc":
            writer.write(key, {"png": png(PIXELS), "txt": f"about {key}"})
    system = fsspec.filesystem("memory")
    for name in ("x-0.tar", "x-1.tar"):
        system.pipe(f"/set/{name}", (tmp_path / "shard-00000.tar").read_bytes())
    system.pipe("/set/y.parquet", write_parquet(tmp_path / "y.parquet").read_bytes())
    yield tmp_path
    system.rm("/set", recursive=True)


def test_urls(memory):
    for text in ("memory://set/x-{0..1}.tar", "memory://set/x-*.tar"):
        listed, passing = find_records([text]), streamed(text)
        assert len(listed) == len(passing) == 6
        for one, other in zip(listed, passing, strict=True):
            assert np.array_equal(pixels_of(one), PIXELS)
            assert np.array_equal(pixels_of(other), PIXELS)
            assert one.caption == other.caption
    listed, passing = find_records(["memory://set/y.parquet"]), streamed("memory://set/y.parquet")
    assert [int(pixels_of(r)[0, 0, 0]) for r in (*listed, *passing)] == [*range(10), *range(10)]


def test_urls_that_lead_nowhere():
    with pytest.raises(DataError, match=r"memory://none/a\.tar: cannot be read"):
        find_records(["memory://none/a.tar"])
    with pytest.raises(DataError, match="matches nothing"):
        find_records(["memory://none/*.tar"])
    with pytest.raises(DataError, match=r"a\.png: a remote input must be a \.tar shard"):
        find_records(["https://example.org/a.png"])
    with pytest.raises(DataError, match=r"nosuch://a/b\.tar: cannot be read"):
        find_records(["nosuch://a/b.tar"])
    (bad,) = streamed("memory://none/a.tar")
    assert isinstance(bad, BadRecord)


def test_commands(memory, tmp_path):
    tar, parquet = tmp_path / "shard-00000.tar", tmp_path / "y.parquet"
    assert [r.caption for r in streamed(f"pipe:cat {tar}")] == ["about a", "about b", "about c"]
    assert len(streamed(f"pipe:cat '{parquet}'")) == 10
    items = streamed(f"pipe:head -c 3000 {tar}; exit 7")
    assert isinstance(items[-1], BadRecord)
    assert "exit code 7" in items[-1].reason


def test_what_a_command_prints_can_be_listed_too(memory, tmp_path):
    tar, log = tmp_path / "shard-00000.tar", tmp_path / "log"
    records = find_records([f"pipe:echo run >> {log}; cat {tar}"])
    assert [record.caption for record in records] == ["about a", "about b", "about c"]
    assert all(np.array_equal(pixels_of(record), PIXELS) for record in records)
    assert log.read_text().count("run") == 1, (
        "images are read from a copy, without running it again"
    )
    with pytest.raises(DataError, match="exit code 7"):
        find_records([f"pipe:head -c 3000 {tar}; exit 7"])


def test_a_loader_of_urls_is_that_of_files(memory, tmp_path):
    def batches(text: str) -> list[list[int]]:
        loader = loading.streamed(Source([text]).shards(), 4, 16, seed=0, buffer=5)
        return [next(loader)["pixels"][:, 0, 0, 0].tolist() for _ in range(6)]

    assert batches("memory://set/y.parquet") == batches(str(tmp_path / "y.parquet"))
    assert batches(f"pipe:cat {tmp_path}/y.parquet # /y.parquet") == batches(
        "memory://set/y.parquet"
    )


# Hugging Face datasets


@pytest.fixture
def saved_set(tmp_path) -> Path:
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "n": datasets.Value("int64")}
    )
    values = {
        "image": [{"bytes": files.noise_png(i, 16), "path": None} for i in range(11)],
        "text": [f"about {i}" for i in range(11)],
        "n": list(range(11)),
    }
    data = datasets.Dataset.from_dict(values, features=features)
    data.save_to_disk(tmp_path / "set", num_shards=3)
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "sets")
    return tmp_path


def test_a_folder_of_save_to_disk(saved_set):
    expected = [np.asarray(Image.open(io.BytesIO(files.noise_png(i, 16)))) for i in range(11)]
    for text in (saved_set / "set", f"hf:{saved_set}/set", f"hf:{saved_set}/sets:train"):
        listed, passing = find_records([text]), streamed(text)
        for records in (listed, passing):
            assert [record.caption for record in records] == [f"about {i}" for i in range(11)]
            assert [record.meta for record in records] == [{"n": i} for i in range(11)]
            for record, pixels in zip(records, expected, strict=True):
                assert np.array_equal(pixels_of(record).transpose(1, 2, 0), pixels)
    (record,) = find_records([f"hf:{saved_set}/sets:test"])
    assert record.caption == "about 4"
    with pytest.raises(DataError, match="the dataset cannot be opened"):
        find_records([f"hf:{saved_set}/sets:none"])


def test_a_loader_of_a_dataset(saved_set):
    shards = Source([saved_set / "set"]).shards()
    assert [shard.name for shard in shards] == ["set#0", "set#1", "set#2"]
    with loading.streamed(shards, 11, 8, seed=0, num_workers=2) as loader:
        batch = next(loader)
    assert sorted(batch["captions"]) == sorted(f"about {i}" for i in range(11))
    listed = loading.listed(find_records([saved_set / "set"]), 11, 8, seed=0)
    by_caption = dict(zip(batch["captions"], batch["pixels"], strict=True))
    other = next(listed)
    for caption, pixels in zip(other["captions"], other["pixels"], strict=True):
        assert (by_caption[caption] == pixels).all()
