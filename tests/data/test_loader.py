import itertools
import json
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data import files
from tests.data.loading import listed
from vlv.data.images import ImageLimits, center_crop_resize, to_tensor
from vlv.data.loader import Loader, LoaderSettings, epoch_batches
from vlv.data.positions import merge_states
from vlv.data.records import Record
from vlv.data.sampling import fingerprint
from vlv.data.source import find_records
from vlv.data.texts import TextMix
from vlv.errors import DataError, OutputError

SIZE = 8
PNGS = [files.noise_png(i, 12) for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    for i, png in enumerate(PNGS):
        (path / f"{i:02d}.png").write_bytes(png)
        (path / f"{i:02d}.txt").write_text(f"caption {i}")
        (path / f"{i:02d}.json").write_text(json.dumps({"number": i}))
    return path


@pytest.fixture(scope="module")
def records(folder) -> list[Record]:
    return find_records([folder])


def names(count: int) -> list[Record]:
    """Records whose images are never read."""
    return [Record(f"{i}", Path(f"{i}.png")) for i in range(count)]


def with_bad(records: list[Record], places: set[int]) -> list[Record]:
    return [
        Record(f"bad{i}", Path("missing.png")) if i in places else record
        for i, record in enumerate(records)
    ]


def flat(lists: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(lists))


def take(loader: Loader, count: int) -> list[list[str]]:
    return [next(loader)["ids"] for _ in range(count)]


# What a batch holds


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch(records, num_workers):
    extra = {"latents": np.arange(60, dtype=np.float16).reshape(30, 2), "label": np.arange(30)}
    with listed(records, 4, SIZE, seed=0, num_workers=num_workers, arrays=extra) as loader:
        batch = next(loader)
    index = batch["index"].tolist()
    assert batch["pixels"].shape == (4, 3, SIZE, SIZE)
    assert batch["pixels"].dtype == torch.uint8
    assert batch["pixels"].is_contiguous()
    for row, i in enumerate(index):
        expected = to_tensor(center_crop_resize(records[i].load(), SIZE))
        assert torch.equal(batch["pixels"][row], expected)
    assert batch["ids"] == [records[i].id for i in index]
    assert batch["captions"] == [f"caption {i}" for i in index]
    assert batch["meta"] == [{"number": i} for i in index]
    assert batch["label"].tolist() == index
    assert torch.equal(batch["latents"], torch.from_numpy(extra["latents"][index]))
    assert batch["latents"].dtype == torch.float16


def test_batches_do_not_share_memory(records):
    loader = listed(records, 30, SIZE, seed=0, shuffle=False, arrays={"x": np.zeros(30)})
    first = next(loader)
    first["pixels"].zero_()
    first["x"].fill_(1)
    second = next(loader)
    assert second["pixels"].float().mean() > 50
    assert second["x"].sum() == 0


def test_without_an_image_size_no_image_is_read():
    batch = next(listed(names(4), 2, None, seed=0))
    assert "pixels" not in batch
    assert len(batch["ids"]) == 2


# Order


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 70),
    batch_size=st.integers(1, 10),
    num_ranks=st.integers(1, 4),
    seed=st.integers(0, 5),
    num_workers=st.sampled_from([0, 0, 0, 2]),
)
def test_no_record_comes_twice_in_an_epoch(count, batch_size, num_ranks, seed, num_workers):
    global_batch = batch_size * num_ranks
    count += global_batch
    per_epoch = count // global_batch
    epochs: list[list[str]] = [[], []]
    for rank in range(num_ranks):
        options = {"rank": rank, "num_ranks": num_ranks, "num_workers": num_workers}
        with listed(names(count), batch_size, None, seed=seed, **options) as loader:
            for epoch in epochs:
                batches = take(loader, per_epoch)
                assert {len(batch) for batch in batches} == {batch_size}
                epoch += flat(batches)
    for number, epoch in enumerate(epochs):
        order = np.random.default_rng([seed, number]).permutation(count)
        assert sorted(epoch) == sorted(f"{i}" for i in order[: per_epoch * global_batch])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    splits=st.permutations([(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)]),
    bad=st.sets(st.integers(0, 39), max_size=9),
    steps=st.integers(0, 9),
)
def test_ranks_share_the_batches_of_one_process(splits, bad, steps):
    """Row i of a global batch is the same for any split, across bad records and a resume with other ranks."""
    records = [
        Record(f"{i}", Path("x.png"), meta_json="{" if i in bad else None) for i in range(40)
    ]

    def ranks(split: tuple[int, int], **options: int) -> list[Loader]:
        return [
            listed(
                records,
                split[1],
                None,
                seed=2,
                max_bad_share=1,
                rank=r,
                num_ranks=split[0],
                **options,
            )
            for r in range(split[0])
        ]

    def global_batches(loaders: list[Loader], count: int) -> list[list[str]]:
        return [flat(next(loader)["ids"] for loader in loaders) for _ in range(count)]

    (whole,) = ranks((1, 12))
    expected = global_batches([whole], 15)
    first, second = ranks(splits[0]), ranks(splits[1], num_workers=2)
    assert global_batches(first, steps) == expected[:steps]
    state = merge_states([loader.state_dict() for loader in first])
    for loader in second:
        loader.load_state_dict(json.loads(json.dumps(state)))
    assert global_batches(second, 15 - steps) == expected[steps:]
    merged = merge_states([loader.state_dict() for loader in second])
    assert merged["positions"] == whole.state_dict()["positions"]
    assert merged["num_checked"] == whole.state_dict()["num_checked"]
    for loader in second:
        loader.close()


def test_the_order_of_one_process_is_the_permutation_itself():
    loader = listed(names(11), 4, None, seed=3)
    for epoch in range(3):
        order = [f"{i}" for i in np.random.default_rng([3, epoch]).permutation(11)]
        assert take(loader, 2) == [order[:4], order[4:8]]


def test_a_bad_record_moves_its_row_alone():
    records = with_bad(names(12), {4})
    records = [replace(r, meta_json="{") if r.id == "bad4" else r for r in records]
    loader = listed(records, 3, None, seed=0, shuffle=False, max_bad_share=1)
    assert take(loader, 5) == [
        ["0", "1", "2"],
        ["3", "7", "5"],
        ["6", "10", "8"],
        ["9", "1", "11"],  # row 1 is in the second epoch already
        ["0", "7", "2"],
    ]


def test_the_state_of_another_rank_is_refused():
    def loader(rank: int) -> Loader:
        return listed(names(20), 3, None, seed=0, rank=rank, num_ranks=2)

    first, second = loader(0), loader(1)
    with pytest.raises(DataError, match="row 3 is needed; merge the states of all ranks"):
        second.load_state_dict(first.state_dict())
    next(first)
    with pytest.raises(DataError, match=r"cannot resume: .*\(batches was 1, now 0\)"):
        merge_states([second.state_dict(), first.state_dict()])
    for wrong in ({"rank": 2, "num_ranks": 2}, {"rank": -1}, {"num_ranks": 0}):
        with pytest.raises(ValueError, match="rank must be at least 0 and less than"):
            listed(names(20), 3, None, seed=0, **wrong)


def test_the_order_follows_seed_and_epoch(records):
    def epochs(seed: int) -> list[list[str]]:
        return take(listed(records, 30, SIZE, seed=seed), 2)

    first, second = epochs(0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first
    unshuffled = take(listed(records, 30, SIZE, seed=0, shuffle=False), 2)
    assert unshuffled[0] == unshuffled[1] == [record.id for record in records]


def test_the_global_generators_are_left_alone(records):
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    expected = (np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    next(listed(records, 4, SIZE, seed=0))
    assert (np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


@pytest.mark.parametrize("bad", [set(), {3, 11}])
def test_threads_change_nothing(records, bad):
    records = with_bad(records, bad)
    loaders = [
        listed(records, 7, SIZE, seed=3, max_bad_share=1, num_workers=n, keep_in_memory=keep)
        for n, keep in ((0, False), (1, True), (3, False))
    ]
    for _ in range(12):
        one, two, three = (next(loader) for loader in loaders)
        assert one["ids"] == two["ids"] == three["ids"]
        assert torch.equal(one["pixels"], two["pixels"])
        assert torch.equal(one["pixels"], three["pixels"])
        states = [loader.state_dict() for loader in loaders]
        assert states[0] == states[1] == states[2]
    for loader in loaders:
        loader.close()


# Resume


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(5, 50),
    batch_size=st.integers(1, 5),
    steps=st.integers(0, 30),
    workers=st.sampled_from([(0, 0), (0, 2), (2, 0)]),
)
def test_resuming_at_any_step_equals_going_on(count, batch_size, steps, workers):
    def loader(num_workers: int) -> Loader:
        return listed(names(count), batch_size, None, seed=1, num_workers=num_workers)

    with loader(workers[0]) as whole, loader(workers[1]) as resumed:
        take(whole, steps)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert take(whole, 8) == take(resumed, 8)
        assert whole.state_dict() == resumed.state_dict()


def test_resuming_past_bad_records(records):
    def loader() -> Loader:
        return listed(with_bad(records, {2, 9, 10}), 4, SIZE, seed=0, max_bad_share=0.2)

    whole, ids, states = loader(), [], []
    for _ in range(20):
        ids += take(whole, 1)
        states.append(whole.state_dict())
    for step in (0, 5, 6, 7, 13):
        resumed = loader()
        resumed.load_state_dict(states[step])
        assert take(resumed, 6) == ids[step + 1 : step + 7]
        assert resumed.state_dict() == states[step + 6]


def test_loading_a_state_in_the_middle_of_an_iteration(records):
    with listed(records, 4, SIZE, seed=0, num_workers=2) as loader:
        state = loader.state_dict()
        first = take(loader, 5)
        loader.load_state_dict(state)
        assert take(loader, 5) == first


def test_the_state_belongs_to_what_was_handed_out(records):
    with listed(records, 4, SIZE, seed=0, num_workers=2) as loader:
        next(loader)
        time.sleep(0.05)  # the threads have read ahead by now
        assert loader.state_dict()["batches"] == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"records": names(29)}, "num_records"),
        ({"records": [*names(29), Record("new", Path("new.png"))]}, "fingerprint"),
        ({"seed": 1}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"image_size": 16}, "image_size"),
        ({"batch_size": 5}, "global_batch"),
        ({"framing": "resize"}, "framing"),
    ],
)
def test_another_data_set_or_order_is_refused(change, field):
    options = {"records": names(30), "batch_size": 4, "image_size": None, "seed": 0}
    state = listed(**options).state_dict()
    with pytest.raises(DataError, match=rf"cannot resume: .*\b{field} was "):
        listed(**{**options, **change}).load_state_dict(state)
    listed(**{**options, "num_workers": 3}).load_state_dict(state)


def test_the_fingerprint_tells_ids_apart():
    ids = [("a", "b"), ("b", "a"), ("ab",), ("a",), ()]
    assert len({fingerprint(names) for names in ids}) == 5


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(0, 9), prefetch=st.integers(1, 4), workers=st.sampled_from([1, 2]))
def test_the_position_is_that_of_the_user(steps, prefetch, workers):
    records = [
        Record(f"{i}", Path("x.png"), meta_json="{" if i % 5 == 2 else None) for i in range(23)
    ]
    plain = listed(records, 4, None, seed=0, max_bad_share=1)
    options = {"max_bad_share": 1, "num_workers": workers, "prefetch": prefetch}
    with listed(records, 4, None, seed=0, **options) as ahead:
        assert ahead.state_dict() == plain.state_dict()
        assert take(ahead, steps) == take(plain, steps)
        state = json.loads(json.dumps(ahead.state_dict()))
        assert state == plain.state_dict()
        expected = take(plain, 6)
        assert take(ahead, 6) == expected
        ahead.load_state_dict(state)  # back, with batches in the making
        assert ahead.state_dict() == state
        assert take(ahead, 6) == expected


# Bad records


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_records_are_skipped_and_the_batch_keeps_its_size(tmp_path, records, num_workers):
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    options = {"seed": 0, "max_bad_share": 0.2, "num_workers": num_workers}
    loader = listed(with_bad(records, {1, 5, 17}), 9, SIZE, quarantine=quarantine, **options)
    batches = take(loader, 12)
    assert {len(batch) for batch in batches} == {9}
    assert set(flat(batches)) == {r.id for i, r in enumerate(records) if i not in (1, 5, 17)}
    loader.close()
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["bad1", "bad17", "bad5"]
    assert lines[0]["source"] == "missing.png"
    assert lines[0]["reason"] == "missing.png: there is no such file"
    assert sorted(loader.quarantine.bad) == ["bad1", "bad17", "bad5"]


def test_a_resumed_run_names_a_bad_record_once(tmp_path, records):
    quarantine = tmp_path / "q.jsonl"
    for _ in range(2):
        loader = listed(
            with_bad(records, {4}), 5, SIZE, seed=0, quarantine=quarantine, max_bad_share=1
        )
        take(loader, 6)
    assert len(quarantine.read_text().splitlines()) == 1
    quarantine.write_text(quarantine.read_text() + '{"id": "cut of')
    loader = listed(records, 5, SIZE, seed=0, quarantine=quarantine)
    assert len(take(loader, 6)) == 6


def test_the_run_stops_above_the_allowed_share(records):
    mixed = with_bad(records, set(range(0, 30, 3)))
    loader = listed(mixed, 2, SIZE, seed=0, max_bad_share=0.1, min_checked=20)
    with pytest.raises(DataError, match=r"of 20 records cannot be read.* share of 0\.1") as caught:
        take(loader, 30)
    assert "missing.png" in str(caught.value)
    assert len(take(listed(mixed, 2, SIZE, seed=0, max_bad_share=0.4), 30)) == 30


def test_an_error_comes_where_its_batch_is_asked_for():
    records = [
        Record(f"{i}", Path("x.png"), meta_json="{" if i % 5 == 2 else None) for i in range(23)
    ]
    good = take(listed(records, 4, None, seed=0, max_bad_share=1), 5)
    options = {"max_bad_share": 0.1, "min_checked": 9, "num_workers": 1}
    with listed(records, 4, None, seed=0, **options) as broken:
        seen: list[list[str]] = []
        with pytest.raises(DataError, match="cannot be read, more than the allowed share"):
            seen.extend(batch["ids"] for batch in broken)
    assert seen
    assert seen == good[: len(seen)]
    assert not decoders()


def test_a_small_set_is_judged_after_one_epoch(records):
    loader = listed(with_bad(records, {0}), 29, SIZE, seed=0)
    with pytest.raises(DataError, match="1 of 30 records cannot be read"):
        take(loader, 3)


def test_a_set_without_any_image_stops():
    with pytest.raises(DataError, match="5 of 5 records cannot be read"):
        next(listed(names(5), 2, SIZE, seed=0))
    with pytest.raises(
        DataError,
        match=r"epochs gave no record that can be read; the latest: \S+\.png: there is no such file",
    ):
        next(listed(names(5), 2, SIZE, seed=0, max_bad_share=1))


def test_records_without_caption_are_bad_where_captions_are_needed(records):
    mute = Record("mute", records[0].source)
    options = {"seed": 0, "max_bad_share": 1, "shuffle": False}
    assert next(listed([mute, *records], 2, SIZE, **options))["captions"][0] is None
    loader = listed([mute, *records], 2, SIZE, texts=TextMix(), **options)
    assert next(loader)["captions"] == ["caption 1", "caption 0"]
    assert loader.quarantine.bad["mute"].reason.endswith("the record mute has no caption")


def test_metadata_that_is_no_json_is_a_bad_record(records):
    bad = Record("m", records[0].source, meta_json="{")
    loader = listed([bad, *records], 30, SIZE, seed=0, max_bad_share=1)
    assert "m" not in next(loader)["ids"]
    assert "not JSON" in loader.quarantine.bad["m"].reason


def test_a_quarantine_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    options = {"seed": 0, "quarantine": tmp_path / "file" / "q.jsonl", "max_bad_share": 1}
    with pytest.raises(OutputError, match=r"q\.jsonl cannot be written"):
        next(listed(names(3), 1, SIZE, **options))


def test_the_limits_reach_the_images(records):
    loader = listed(records, 2, SIZE, seed=0, limits=ImageLimits(max_side=10))
    with pytest.raises(DataError, match="limit of 10 a side"):
        next(loader)


# Memory


def test_kept_images_are_decoded_once(tmp_path, folder):
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in folder.glob("*.png"):
        (copies / path.name).write_bytes(path.read_bytes())
    records = find_records([copies])
    kept = listed(records, 30, SIZE, seed=0, shuffle=False)
    read_again = listed(records, 30, SIZE, seed=0, shuffle=False, keep_in_memory=False)
    first = next(kept)["pixels"]
    assert torch.equal(first, next(read_again)["pixels"])
    for path in copies.iterdir():
        path.unlink()
    assert torch.equal(next(kept)["pixels"], first)
    with pytest.raises(DataError, match="cannot be read"):
        next(read_again)


# Arguments and shutdown


def test_arguments_are_checked():
    with pytest.raises(DataError, match="3 records are too few for batches of 4"):
        listed(names(3), 4, SIZE, seed=0)
    with pytest.raises(DataError, match="7 records are too few for batches of 8"):
        listed(names(7), 4, SIZE, seed=0, num_ranks=2)
    with pytest.raises(DataError, match="'latents' has 2 rows for 3 records"):
        listed(names(3), 1, SIZE, seed=0, arrays={"latents": np.zeros(2)})
    with pytest.raises(DataError, match="'pixels' is a name of the loader"):
        listed(names(3), 1, SIZE, seed=0, arrays={"pixels": np.zeros(3)})
    for wrong in ({"batch_size": 0}, {"num_workers": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            listed(**{"records": names(3), "batch_size": 1, "image_size": 8, "seed": 0, **wrong})


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("vlv-decode")]


def break_off(loader: Loader) -> None:
    with loader:
        next(loader)
        assert decoders()
        raise KeyError


def test_no_thread_is_left(records):
    loader = listed(records, 4, SIZE, seed=0, num_workers=3)
    with pytest.raises(KeyError):
        break_off(loader)
    assert not decoders()
    with pytest.raises(StopIteration):
        next(loader)
    forgotten = listed(records, 4, SIZE, seed=0, num_workers=3)
    next(forgotten)
    del forgotten
    deadline = time.monotonic() + 60
    while decoders() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not decoders()


# One pass


def one_pass(
    records: list[Record], batch_size: int, on_bad: Any = None, **options: Any
) -> Generator[dict[str, Any]]:
    settings = LoaderSettings(batch_size=batch_size, image_size=SIZE, **options)
    return epoch_batches(records, settings, on_bad=on_bad)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 15, 30, 100])
def test_one_pass_in_order(records, batch_size, num_workers):
    batches = list(one_pass(records, batch_size, num_workers=num_workers))
    assert flat(batch["ids"] for batch in batches) == [record.id for record in records]
    assert {len(batch["ids"]) for batch in batches[:-1]} <= {batch_size}
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(30))
    assert not decoders()


def test_one_pass_reports_what_it_skips(records):
    told = []
    mixed = with_bad(records, {0, 28, 29})
    batches = list(one_pass(mixed, 9, on_bad=told.append))
    assert [len(batch["ids"]) for batch in batches] == [9, 9, 9]
    assert [bad.id for bad in told] == ["bad0", "bad28", "bad29"]
    with pytest.raises(DataError, match=r"missing\.png"):
        list(one_pass(mixed, 9))


def test_one_pass_over_nothing():
    assert list(one_pass([], 4)) == []
    told = []
    assert list(one_pass(names(3), 2, on_bad=told.append)) == []
    assert len(told) == 3


def test_a_pass_that_is_broken_off_leaves_no_thread(records):
    batches = one_pass(records, 4, num_workers=2)
    next(batches)
    batches.close()
    assert not decoders()


# Workers


class Hanging(Record):
    """A record whose file does not answer until it is let go."""

    go = threading.Event()

    def load(self, *, limits: ImageLimits = ImageLimits()) -> Image.Image:  # noqa: B008
        if self.id == "hung":
            self.go.wait(60)
        return super().load(limits=limits)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_hung_read_is_a_bad_record(tmp_path, records, num_workers):
    Hanging.go.clear()
    slow = [Hanging("hung" if i == 1 else r.id, r.source) for i, r in enumerate(records)]
    options = {"seed": 0, "max_bad_share": 1, "shuffle": False, "num_workers": num_workers}
    q = tmp_path / "q.jsonl"
    with listed(slow, 4, SIZE, timeout_seconds=1.5, quarantine=q, **options) as loader:
        assert take(loader, 2) == [
            [f"{i:02d}.png" for i in (0, 5, 2, 3)],
            [f"{i:02d}.png" for i in (4, 9, 6, 7)],
        ]
    Hanging.go.set()
    (line,) = q.read_text().splitlines()
    assert json.loads(line)["id"] == "hung"
    assert json.loads(line)["reason"].endswith("01.png: reading took longer than 1.5 seconds")


def test_an_error_of_a_thread_is_raised_where_its_row_is_asked_for(records, monkeypatch):
    monkeypatch.setattr("vlv.data.decoding.frame", lambda *_: 1 / 0)
    with (
        listed(records, 4, SIZE, seed=0, num_workers=2) as loader,
        pytest.raises(ZeroDivisionError),
    ):
        next(loader)
