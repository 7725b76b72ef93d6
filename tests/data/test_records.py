import json
import pickle
from dataclasses import replace

import pytest

from tests.data import files
from vlv.data.images import ImageLimits
from vlv.data.records import Record, Span
from vlv.data.shards import TarShardWriter
from vlv.data.source import find_records
from vlv.errors import DataError, ImageError

PNG = files.noise_png(0)


def put(folder, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)


def ids(*inputs, **options) -> list[str]:
    return [record.id for record in find_records(list(inputs), **options)]


def shard(folder, keys: str, **options) -> None:
    with TarShardWriter(folder, **options) as writer:
        for key in keys:
            writer.write(key, {"png": PNG, "txt": f" about {key}\n", "json": {"key": key}})


# The record itself


def test_a_record_keeps_its_metadata_as_text():
    record = Record("a", files.__file__, "text", {"n": [1, "é"]})
    assert record.meta == {"n": [1, "é"]}
    assert record.meta_json == '{"n": [1, "é"]}'
    assert Record("a", files.__file__).meta is None
    assert replace(record, caption="other").meta == record.meta
    assert pickle.loads(pickle.dumps(record)) == record
    assert len({record, replace(record)}) == 1


def test_metadata_that_is_no_object_is_an_error():
    for text in ("[1]", "{"):
        with pytest.raises(DataError, match=r"^a: "):
            _ = Record("a", files.__file__, meta_json=text).meta


def test_opening_a_record(tmp_path):
    put(tmp_path, "a.png")
    shard(tmp_path, "x")
    in_file, in_tar = find_records([tmp_path / "a.png", tmp_path / "shard-00000.tar"])
    assert in_file.open() == in_tar.open() == PNG
    assert in_file.load().tobytes() == in_tar.load().tobytes()
    for record in (in_file, in_tar):
        with pytest.raises(ImageError, match="limit of 10 bytes"):
            record.open(max_bytes=10)
        with pytest.raises(ImageError, match="limit of 10 bytes"):
            record.load(limits=ImageLimits(max_bytes=10))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        in_file.open()


def test_a_bad_image_in_a_tar_is_named(tmp_path):
    with TarShardWriter(tmp_path) as writer:
        writer.write("k", {"png": b"garbage"})
    (record,) = find_records([tmp_path])
    with pytest.raises(ImageError, match=r"shard-00000\.tar/k: this is no image of a format"):
        record.load()


# Folders, files, globs


def test_a_folder_is_searched_in_sorted_order(tmp_path):
    put(
        tmp_path,
        "b.png",
        "a/z.JPG",
        "a.png",
        "a/b/c.webp",
        ".hidden.png",
        ".git/x.png",
        "a/._z.JPG",
    )
    (tmp_path / "notes.md").write_text("no image")
    assert ids(tmp_path) == ["a.png", "b.png", "a/z.JPG", "a/b/c.webp"]
    assert ids(tmp_path, recursive=False) == ["a.png", "b.png"]
    assert ids(str(tmp_path / "a")) == ["z.JPG", "b/c.webp"]


def test_sidecars_give_caption_and_metadata(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("\ufeffA cube. \n", encoding="utf-8")
    (tmp_path / "a.json").write_text('{"n": 1}')
    for inputs in ([tmp_path], [tmp_path / "a.png", tmp_path / "b.png"]):
        first, second = find_records(inputs)
        assert (first.caption, first.meta) == ("A cube.", {"n": 1})
        assert (second.caption, second.meta) == (None, None)


def test_a_sidecar_that_is_no_text_is_named(tmp_path, caplog):
    put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (record,) = find_records([tmp_path])
    assert record.caption is None
    assert "a.txt: the text is not UTF-8; its image is listed without it" in caplog.text


def test_globs_are_relative_to_their_fixed_part(tmp_path):
    put(tmp_path, "x/a.png", "x/b.png", "x/c.jpg", "y/a.png")
    (tmp_path / "x" / "a.txt").write_text("caption")
    assert ids(tmp_path / "x" / "*.png") == ["a.png", "b.png"]
    assert ids(tmp_path / "*" / "a.png") == ["x/a.png", "y/a.png"]
    assert ids(tmp_path / "**" / "*") == ["x/a.png", "x/b.png", "x/c.jpg", "y/a.png"]
    assert ids(tmp_path / "[xy]") == ["x/a.png", "x/b.png", "x/c.jpg", "y/a.png"]


def test_a_name_with_magic_letters_is_taken_literally_when_it_exists(tmp_path):
    put(tmp_path, "a[1].png", "b{0..1}.png", "a1.png")
    assert ids(tmp_path / "a[1].png", tmp_path / "b{0..1}.png") == ["a[1].png", "b{0..1}.png"]


def test_sidecars_swept_up_by_the_shell_are_passed_over(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("caption")
    assert ids(tmp_path / "a.png", tmp_path / "a.txt") == ["a.png"]


def test_an_image_found_twice_is_listed_once(tmp_path):
    put(tmp_path, "a.png", "b.png")
    assert ids(tmp_path / "b.png", tmp_path, tmp_path / "*.png") == ["b.png", "a.png"]


def test_equal_ids_of_two_inputs_are_told_apart(tmp_path):
    put(tmp_path, "x/a.png", "y/a.png", "y/b.png")
    x, y = tmp_path / "x", tmp_path / "y"
    assert ids(x, y) == [f"{x}/a.png", f"{y}/a.png", "b.png"]
    shard(x, "k")
    shard(y, "k")
    assert ids(x / "shard-00000.tar", y / "shard-00000.tar") == [
        f"{x}/shard-00000.tar/k",
        f"{y}/shard-00000.tar/k",
    ]


# Tar shards


def test_tar_shards_and_brace_ranges(tmp_path):
    shard(tmp_path, "abcdef", per_shard=2)
    assert ids(tmp_path) == list("abcdef")
    assert ids(tmp_path / "shard-{00000..00001}.tar") == list("abcd")
    records = find_records([tmp_path / "shard-00002.tar"])
    assert isinstance(records[1].source, Span)
    assert (records[1].id, records[1].caption, records[1].meta) == ("f", "about f", {"key": "f"})
    with pytest.raises(DataError, match=r"shard-00003\.tar: there is no such file"):
        find_records([str(tmp_path / "shard-{00002..00003}.tar")])


def test_a_truncated_tar_is_an_error_or_keeps_its_whole_records(tmp_path, caplog):
    shard(tmp_path, "abc")
    path = tmp_path / "shard-00000.tar"
    size = find_records([path])[2].source.offset
    path.write_bytes(path.read_bytes()[: size + 5])
    with pytest.raises(DataError, match=r"shard-00000\.tar: the tar is truncated"):
        find_records([path])
    assert ids(path, on_damage="keep") == ["a", "b"]
    assert "truncated" in caplog.text


def test_keys_without_image_are_left_out_and_named(tmp_path, caplog):
    with TarShardWriter(tmp_path) as writer:
        writer.write("a", {"png": PNG})
        writer.write("b", {"txt": "no image"})
        writer.write("c", {"png": PNG, "txt": b"\xff\xff"})
    assert ids(tmp_path) == ["a", "c"]
    assert "1 keys without an image are left out: b" in caplog.text
    assert "c.txt: the text is not UTF-8" in caplog.text


def test_a_tar_without_images(tmp_path):
    with TarShardWriter(tmp_path) as writer:
        writer.write("a", {"txt": "text"})
    with pytest.raises(DataError, match=r"shard-00000\.tar: the tar holds no images"):
        find_records([tmp_path])


# Tables


def test_jsonl(tmp_path):
    put(tmp_path, "i/a.png", "i/b.png")
    lines = [
        {"file_name": "i/a.png", "caption": "one", "score": 2},
        {"path": str(tmp_path / "i/b.png"), "text": "two", "id": "second"},
        {"file_name": "i/a.png", "caption": "again"},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second, third = find_records([path])
    assert (first.caption, first.meta, second.caption, third.caption) == (
        "one",
        {"score": 2},
        "two",
        "again",
    )
    assert [second.id, third.source] == ["second", tmp_path / "i/a.png"]
    assert [first.id, third.id] == [f"{path}/i/a.png", f"{path}/i/a.png#2"]
    assert {record.open() for record in (first, second, third)} == {PNG}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "a.png"}\n{oops', "line 2: this is not JSON"),
        ("[1]", "line 1: a JSON object is wanted"),
        ('{"caption": "x"}', "line 1: none of the fields file_name, path"),
        ("\n", "holds no records"),
    ],
)
def test_bad_jsonl(tmp_path, text, message):
    path = tmp_path / "list.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"list\.jsonl.*{message}"):
        find_records([path])


def write_parquet(path, rows: list[dict], **options) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def test_parquet_with_image_bytes(tmp_path):
    path = tmp_path / "x.parquet"
    pngs = [files.noise_png(i) for i in range(5)]
    rows = [
        {"image": {"bytes": png, "path": "p"}, "text": f"t{i}", "n": i}
        for i, png in enumerate(pngs)
    ]
    write_parquet(path, rows, row_group_size=2)
    records = find_records([path])
    assert [record.open() for record in records] == pngs
    assert [record.caption for record in records] == ["t0", "t1", "t2", "t3", "t4"]
    assert records[3].meta == {"n": 3}
    assert records[3].id == "00001-000001"
    assert records[3].load().size == (24, 24)


def test_parquet_of_images_alone_with_ids_or_paths(tmp_path):
    put(tmp_path, "a.png")
    write_parquet(tmp_path / "x.parquet", [{"png": PNG}])
    write_parquet(tmp_path / "y.parquet", [{"key": "k", "jpg": PNG}, {"key": "l", "jpg": None}])
    write_parquet(tmp_path / "z.parquet", [{"file_name": "a.png", "caption": None}])
    bare, keyed, empty, named = find_records([tmp_path / "[xyz].parquet"])
    assert [bare.open(), keyed.open(), named.open()] == [PNG, PNG, PNG]
    assert [keyed.id, named.id, named.source] == ["k", "a.png", tmp_path / "a.png"]
    with pytest.raises(DataError, match="holds no image bytes"):
        empty.open()


def test_bad_parquet(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_parquet(path, [{"caption": "no image"}])
    with pytest.raises(DataError, match=r"x\.parquet, row group 0, row 0: none of the fields"):
        find_records([path])
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read as Parquet"):
        find_records([path])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'vlv\[data\]'"):
        find_records([path])


# What is refused


def test_missing_empty_and_unknown_inputs(tmp_path):
    put(tmp_path, "deep/down/a.png")
    (tmp_path / "a.docx").touch()
    (tmp_path / "lonely.txt").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        "no.png": r"no\.png: there is no such file or folder",
        "*.gif": r"\*\.gif: matches nothing that vlv reads",
        "a.docx": r"a\.docx: vlv does not read this type of file",
        "lonely.txt": r"lonely\.txt: vlv does not read this type",
        "empty": "empty: the folder holds no images",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            find_records([tmp_path / name])
    with pytest.raises(DataError, match="its subfolders were not searched"):
        find_records([tmp_path / "deep"], recursive=False)
    with pytest.raises(DataError, match="no input was given"):
        find_records([])
