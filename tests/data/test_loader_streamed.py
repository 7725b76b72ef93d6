import gc
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import files
from tests.data.loading import streamed
from vlv.data.images import center_crop_resize, to_tensor
from vlv.data.loader import Loader
from vlv.data.parts import Part
from vlv.data.positions import merge_states
from vlv.data.records import BadRecord, Record
from vlv.data.shards import TarShardWriter
from vlv.data.source import Source, find_records
from vlv.data.tars import TarShard
from vlv.data.texts import TextMix
from vlv.errors import DataError

SIZE = 8
COUNTS = (7, 1, 12, 5, 9)


def write_tar(path: Path, keys: list[str]) -> None:
    writer = TarShardWriter(path.parent, path.name, per_shard=1000)
    with writer:
        for key in keys:
            parts = {"png": files.noise_png(hash(key) % 1000, 12), "txt": f"about {key}"}
            writer.write(key, parts)
    (path.parent / f"{path.name}-00000.tar").rename(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    for number, count in enumerate(COUNTS):
        write_tar(path / f"{number}.tar", [f"{number}-{i:02d}" for i in range(count)])
    return path


@pytest.fixture(scope="module")
def shards(folder) -> list[Part]:
    return Source([folder]).shards()


class Given(Part):
    """A shard of records that are made when they are read."""

    def read(self, start: int = 0) -> Iterator[Record | BadRecord]:
        count = int(str(self.source).partition("x")[2])
        for i in range(start, count):
            name = f"{self.source}-{i}"
            yield BadRecord(name, name, "bad") if i % 5 == 3 else Record(name, Path(name))


def given_shards(counts: list[int]) -> list[Part]:
    return [Given(f"{number}x{count}") for number, count in enumerate(counts)]


def sound(shard: Part) -> set[str]:
    return {item.id for item in shard.read() if isinstance(item, Record)}


def loaders(shards: list[Part], num_ranks: int, global_batch: int = 12, **options) -> list[Loader]:
    options = {"seed": 3, "buffer": 7, "max_bad_share": 1, "num_partitions": 4, **options}
    return [
        streamed(shards, global_batch // num_ranks, None, rank=r, num_ranks=num_ranks, **options)
        for r in range(num_ranks)
    ]


def take(ranks: list[Loader], count: int) -> list[list[str]]:
    """Ids of global batches."""
    return [list(itertools.chain(*(next(rank)["ids"] for rank in ranks))) for _ in range(count)]


# What a batch holds


def test_tables_beside_tars_and_hidden_files_are_no_shards(tmp_path):
    (tmp_path / ".vlv-latents" / "0.tar").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    names = ("0.tar", "0.parquet", ".1.tar", ".vlv-latents/0.tar/x.tar", "tables/2.parquet")
    for name in names:
        (tmp_path / name).touch()
    found = [str(Path(str(shard)).relative_to(tmp_path)) for shard in Source([tmp_path]).shards()]
    assert found == ["0.tar", "tables/2.parquet"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch(folder, shards, num_workers):
    options = {"seed": 0, "shuffle": False, "num_workers": num_workers}
    listed = find_records([folder])
    with streamed(
        shards, 5, SIZE, rows_of=lambda _, r: {"n": torch.tensor(len(r.id)).numpy()}, **options
    ) as loader:
        batch = next(loader)
    assert batch["ids"] == [f"{folder}/0.tar/0-{i:02d}" for i in range(5)]
    assert batch["captions"] == [f"about 0-{i:02d}" for i in range(5)]
    assert batch["n"].tolist() == [len(name) for name in batch["ids"]]
    for row in range(5):
        expected = to_tensor(center_crop_resize(listed[row].load(), SIZE))
        assert torch.equal(batch["pixels"][row], expected)


def test_without_shuffling_the_order_is_that_of_the_files(folder, shards):
    loader = streamed(shards, 17, SIZE, seed=0, shuffle=False)
    listed = [f"{record.source.path}/{record.id}" for record in find_records([folder])]
    assert take([loader], 4) == [listed[:17], listed[17:34], listed[:17], listed[17:34]]


def test_shuffling_moves_records_and_shards(shards):
    loader = streamed(shards, 34, SIZE, seed=0, buffer=8)
    first, second = take([loader], 2)
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)
    (again,) = take([streamed(shards, 34, SIZE, seed=0, buffer=8)], 1)
    assert again == first


# Every record once


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=9),
    num_ranks=st.sampled_from([1, 2, 4]),
    buffer=st.integers(1, 30),
    num_workers=st.sampled_from([0, 0, 2]),
)
def test_every_record_comes_once_per_epoch(counts, num_ranks, buffer, num_workers):
    shards = given_shards([*counts, 40])
    ranks = loaders(shards, num_ranks, buffer=buffer, num_workers=num_workers)
    batches = take(ranks, 60)
    for rank in ranks:
        rank.close()
    plan, seen = ranks[0].sampler, []
    for partition in range(4):
        rows = [name for batch in batches for name in batch[3 * partition : 3 * partition + 3]]
        for epoch in range(2):
            wanted = set()
            for shard, part, num_parts in plan.shards_of(epoch, partition):
                items = itertools.islice(shard.read(), part, None, num_parts)
                wanted |= {item.id for item in items if isinstance(item, Record)}
            if len(wanted) <= len(rows):
                assert set(rows[: len(wanted)]) == wanted
                seen += rows[: len(wanted)] if not epoch else []
            rows = rows[len(wanted) :]
    if len(seen) == sum(len(sound(shard)) for shard in shards):
        assert set(seen) == set.union(*(sound(shard) for shard in shards))


def test_an_epoch_over_all_partitions_holds_every_record_once():
    shards = given_shards([10, 20, 30, 5, 15])
    plan = loaders(shards, 2)[0].sampler
    for epoch in range(3):
        units = [unit for partition in range(4) for unit in plan.shards_of(epoch, partition)]
        assert sorted(str(shard) for shard, _, _ in units) == sorted(str(s) for s in shards)
    few = loaders(given_shards([40, 8]), 1)[0].sampler
    units = [unit for partition in range(4) for unit in few.shards_of(0, partition)]
    assert sorted((str(s), part, n) for s, part, n in units) == [
        (name, part, 2) for name in ("0x40", "1x8") for part in (0, 1)
    ]


# Resume


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=9),
    splits=st.permutations([1, 2, 4]),
    workers=st.permutations([0, 1, 3]),
    buffer=st.sampled_from([1, 4, 7, 100]),
    steps=st.integers(0, 15),
)
def test_resuming_with_other_ranks_and_workers_equals_going_on(
    counts, splits, workers, buffer, steps
):
    shards = given_shards([*counts, 20, 20, 20, 20])
    whole, first, second = (
        loaders(shards, split, buffer=buffer, num_workers=count)
        for split, count in zip(splits, workers, strict=True)
    )
    expected = take(whole, 25)
    assert take(first, steps) == expected[:steps]
    state = merge_states([rank.state_dict() for rank in first])
    for rank in second:
        rank.load_state_dict(json.loads(json.dumps(state)))
    assert take(second, 25 - steps) == expected[steps:]
    merged = [merge_states([rank.state_dict() for rank in ranks]) for ranks in (whole, second)]
    assert merged[0] == merged[1]
    for rank in (*whole, *first, *second):
        rank.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_from_files(shards, num_workers):
    def loader(workers: int) -> Loader:
        return streamed(shards, 4, SIZE, seed=1, buffer=6, num_workers=workers)

    whole, states, batches = loader(num_workers), [], []
    for _ in range(25):
        states.append(json.dumps(whole.state_dict()))
        batches.append(next(whole))
    for step in (0, 3, 8, 9, 17):  # within a block, within a shard, across an epoch
        resumed = loader(2 - num_workers)
        resumed.load_state_dict(json.loads(states[step]))
        for expected in batches[step : step + 6]:
            batch = next(resumed)
            assert batch["ids"] == expected["ids"]
            assert torch.equal(batch["pixels"], expected["pixels"])
        resumed.close()
    assert len(states[-1]) < 700
    whole.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"buffer": 8}, "buffer"),
        ({"shuffle": False}, "shuffle"),
        ({"num_partitions": 2}, "num_partitions"),
        ({"global_batch": 24}, "global_batch"),
    ],
)
def test_another_order_is_refused(change, field):
    (loader,), (other,) = loaders(given_shards([20]), 1), loaders(given_shards([20]), 1, **change)
    with pytest.raises(DataError, match=rf"cannot resume: .*\b{field} was "):
        other.load_state_dict(loader.state_dict())
    (others,) = loaders(given_shards([20, 3]), 1)
    with pytest.raises(DataError, match=r"cannot resume: .*num_shards was "):
        others.load_state_dict(loader.state_dict())


def test_the_state_of_another_rank_is_refused():
    first, second = loaders(given_shards([20, 20]), 2)
    with pytest.raises(DataError, match="merge the states of all ranks"):
        second.load_state_dict(first.state_dict())


def test_partitions_must_fit():
    for num_ranks, num_partitions in ((2, 3), (1, 5), (4, 2)):
        with pytest.raises(DataError, match=f"{num_partitions} partitions do not fit"):
            loaders(given_shards([9]), num_ranks, num_partitions=num_partitions)


# Bad records


def read_all(loader: Loader, count: int) -> set[str]:
    return {name.rpartition("/")[2] for batch in take([loader], count) for name in batch}


def quarantined(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["id"]: line["reason"] for line in lines}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_records_are_named_and_the_batch_keeps_its_size(tmp_path, num_workers):
    keys = [f"{i:02d}" for i in range(20)]
    for name in ("whole", "cut", "empty"):
        write_tar(tmp_path / f"{name}.tar", [f"{name}{key}" for key in keys])
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.tar").write_bytes(b"")
    with TarShardWriter(tmp_path, "odd") as writer:
        writer.write("odd0", {"png": b"no image", "txt": "bad"})
        writer.write("odd1", {"txt": "a caption alone"})
        writer.write("odd2", {"png": files.noise_png(0)})
        writer.write("odd3", {"png": files.noise_png(1), "txt": "good"})
    quarantine = tmp_path / "q.jsonl"
    options = {"seed": 0, "max_bad_share": 1, "num_workers": num_workers, "texts": TextMix()}
    with streamed(Source([tmp_path]).shards(), 4, SIZE, quarantine=quarantine, **options) as loader:
        seen = read_all(loader, 20)
    assert {f"whole{key}" for key in keys} < seen
    assert seen - {f"whole{key}" for key in keys} - {f"cut{key}" for key in keys} == {"odd3"}
    found = {
        name.removeprefix(f"{tmp_path}/"): reason
        for name, reason in quarantined(quarantine).items()
    }
    odd = "odd-00000.tar/odd"
    assert set(found) == {"cut.tar", "empty.tar", f"{odd}0", f"{odd}1", f"{odd}2"}
    assert "the tar is damaged after" in found["cut.tar"]
    assert "this is no image" in found[f"{odd}0"]
    assert "the sample has no image" in found[f"{odd}1"]
    assert "has no caption" in found[f"{odd}2"]


def test_a_tar_that_ends_between_two_members_is_truncated(tmp_path):
    write_tar(tmp_path / "a.tar", ["a", "b"])
    content = (tmp_path / "a.tar").read_bytes()
    end = content.rindex(b"about b") + 512 - (content.rindex(b"about b") % 512)
    (tmp_path / "a.tar").write_bytes(content[:end])
    items = list(TarShard(tmp_path / "a.tar").read())
    assert [item.id for item in items][:1] == [f"{tmp_path}/a.tar/a"]
    assert isinstance(items[-1], BadRecord)
    assert "it is truncated" in items[-1].reason


def test_members_that_do_not_lie_side_by_side(tmp_path):
    write_tar(tmp_path / "a.tar", ["a", "b"])
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("a.json")
        tar.addfile(info)
    items = list(TarShard(tmp_path / "a.tar").read())
    assert isinstance(items[-1], BadRecord)
    assert "the members of a do not lie side by side" in items[-1].reason


def test_the_run_stops_above_the_allowed_share():
    (loader,) = loaders(given_shards([50, 50]), 1, max_bad_share=0.1, min_checked=30)
    with pytest.raises(DataError, match=r"of 30 records cannot be read.* share of 0\.1"):
        take([loader], 10)


def test_shards_without_a_readable_record():
    nothing = [Given("4x0")]
    with pytest.raises(DataError, match="the 1 shards hold no records"):
        next(streamed(nothing, 1, None, seed=0))

    class Bad(Part):
        def read(self, start: int = 0) -> Iterator[BadRecord]:
            yield from [BadRecord("x", "x", "it is bad")][start:]

    with pytest.raises(
        DataError, match=r"epochs gave no record that can be read; the latest: it is bad"
    ):
        next(streamed([Bad("1")], 1, None, seed=0, max_bad_share=1))


@pytest.mark.slow
def test_a_hung_shard_is_a_bad_record(tmp_path):
    go = threading.Event()

    class Hung(Given):
        def read(self, start: int = 0) -> Iterator[Record | BadRecord]:
            go.wait(60)
            yield from super().read(start)

    shards = [Given("0x3"), Hung("1x3"), Given("2x3")]
    quarantine = tmp_path / "q.jsonl"
    options = {"shuffle": False, "max_bad_share": 1, "timeout_seconds": 0.5, "num_workers": 1}
    with streamed(shards, 6, None, seed=0, quarantine=quarantine, **options) as loader:
        assert next(loader)["ids"] == ["0x3-0", "0x3-1", "0x3-2", "2x3-0", "2x3-1", "2x3-2"]
    go.set()
    assert "reading took longer than 0.5 seconds" in quarantined(quarantine)["1x3"]


# Memory


class Counted:
    """The source of a record; it knows how many of its kind are in memory, and were at most."""

    path = "counted"
    alive = most = 0

    def __init__(self) -> None:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


class Many(Given):
    def read(self, start: int = 0) -> Iterator[Record | BadRecord]:
        for i in range(start, int(str(self.source))):
            yield Record(f"{i}", Counted())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_does_not_grow_with_the_number_of_records(num_workers):
    def most(count: int) -> int:
        gc.collect()
        Counted.most = before = Counted.alive
        shards = [Many(f"{count}")] * 4
        with streamed(shards, 8, None, seed=0, buffer=32, num_workers=num_workers) as loader:
            take([loader], count)  # two epochs
        return Counted.most - before

    assert 32 <= most(40) <= 4 * 32
    assert most(300) <= 4 * 32


# Inputs


def test_the_kinds_of_shards(tmp_path, folder):
    assert [shard.name for shard in Source([folder]).shards()] == [f"{i}.tar" for i in range(5)]
    (tmp_path / "list.txt").write_text(f"# shards\n{folder}/{{0..2}}.tar\n\n{folder}/4.tar\n")
    assert [s.name for s in Source([f"@{tmp_path}/list.txt"]).shards()] == [
        f"{i}.tar" for i in (0, 1, 2, 4)
    ]
    assert [s.name for s in Source([f"{folder}/[13].tar"]).shards()] == ["1.tar", "3.tar"]
    (tmp_path / "a.png").write_bytes(files.noise_png(0))
    with pytest.raises(DataError, match=r"a\.png: only \.tar and \.parquet files .* are streamed"):
        Source([tmp_path / "a.png"]).shards()
    with pytest.raises(DataError, match="no shard was given to stream"):
        Source([tmp_path]).shards()
    with pytest.raises(DataError, match=r"none\.txt: the list of inputs cannot be read"):
        Source([f"@{tmp_path}/none.txt"]).shards()


def test_what_must_be_streamed(folder, monkeypatch):
    assert not Source([str(folder)]).must_stream()
    assert Source([str(folder), "pipe:cat x.tar"]).must_stream()
    assert Source(["s3://bucket/{00..11}.tar"]).must_stream()
    monkeypatch.setattr("vlv.data.source._LISTED_BYTES", 1000)
    assert Source([str(folder)]).must_stream()


def test_records_in_passing(folder):
    items = list(Source([folder]).stream())
    assert len(items) == sum(COUNTS)
    assert {item.load().size for item in items if isinstance(item, Record)} == {(12, 12)}
