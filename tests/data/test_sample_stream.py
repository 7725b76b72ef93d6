"""The order of samples, recorded once: the same seed must give the same rows, bit for bit, for ever."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.data import files
from tests.data.loading import listed, streamed
from vlv.data.shards import TarShardWriter
from vlv.data.source import Source, find_records

BAD = {(0, 3), (2, 5)}
RECORDED = {
    "listed": "4deb680c0469fb356fceb9d6d890e2b2408a1bfa051bc6b4f1091145c1f89ff2",
    "streamed": "256e5d0cfec7c7cb8f11c4987f9aa24c4c3f4e631c5589397fd3898623296912",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five shards of 34 images, two of which cannot be read."""
    path = tmp_path_factory.mktemp("shards")
    for number, count in enumerate((7, 1, 12, 5, 9)):
        with TarShardWriter(path / f"{number}", per_shard=100) as writer:
            for i in range(count):
                bad = (number, i) in BAD
                data = b"no image" if bad else files.noise_png(100 * number + i, 12)
                writer.write(f"{number}-{i:02d}", {"png": data, "txt": f"about {number}-{i}"})
        (path / f"{number}" / "shard-00000.tar").rename(path / f"{number}.tar")
    return path


def digest(batches: Iterable[dict[str, Any]]) -> str:
    """A hash of ids, captions and pixels, row by row."""
    found = hashlib.sha256()
    for batch in batches:
        for name, caption, pixels in zip(
            batch["ids"], batch["captions"], batch["pixels"], strict=True
        ):
            found.update(f"{name.rpartition('/')[2]} {caption}\n".encode())
            found.update(pixels.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", sorted(RECORDED))
def test_the_stream_of_samples_is_the_recorded_one(folder, kind, num_ranks, num_workers):
    options = {"seed": 3, "max_bad_share": 1, "num_ranks": num_ranks, "num_workers": num_workers}
    batch_size = 6 // num_ranks
    ranks: list[Any] = []
    for rank in range(num_ranks):
        if kind == "listed":
            records = find_records([f"{folder}/{{0..4}}.tar"])
            ranks.append(listed(records, batch_size, 8, rank=rank, **options))
        else:
            options |= {"buffer": 4, "num_partitions": 2}
            ranks.append(streamed(Source([folder]).shards(), batch_size, 8, rank=rank, **options))
    batches = [next(rank) for _ in range(20) for rank in ranks]
    for rank in ranks:
        rank.close()
    assert digest(batches) == RECORDED[kind]
