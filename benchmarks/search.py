"""Queries a second of an index of synthetic images, and their longest times, on one core.

    OMP_NUM_THREADS=1 python benchmarks/search.py --num 100000 --json search.json

Tokens are clusters with noise in the shapes of a model; a query is some tokens of one image with noise, so that the right image is known.
Nothing is encoded: a text takes the text tower a few milliseconds more, an image the encoder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vlv.models.pipeline import VLVPipeline
from vlv.models.search_space import PlainSpace
from vlv.search.build import ModelName, begin_index
from vlv.search.engine import update_graph
from vlv.search.index import Index, Query
from vlv.search.parts import MOST_ROWS, ROW_BITS, Row, read_parts, write_part
from vlv.storage import Json, write_json

CLUSTERS = 1000
NOISE = 0.7


def tokens_of(number: int, shape: tuple[int, int], centres: torch.Tensor) -> torch.Tensor:
    """The tokens of a synthetic image, (L, d)."""
    rng = torch.Generator().manual_seed(number)
    own = centres[torch.randint(len(centres), (4,), generator=rng)].mean(0)
    return F.normalize(own + NOISE * torch.randn(shape, generator=rng) / shape[1] ** 0.5, dim=-1)


def pooled(tokens: torch.Tensor) -> torch.Tensor:
    """Their direction, (d,)."""
    return F.normalize(tokens.mean(0), dim=-1)


def fill(folder: Path, num: int, shape: tuple[int, int], centres: torch.Tensor) -> None:
    """Write the parts."""
    for first in range(0, num, MOST_ROWS):
        rows = []
        for number in range(first, min(num, first + MOST_ROWS)):
            tokens = tokens_of(number, shape, centres)
            about = {"id": str(number), "file_name": f"{number}.png", "sha256": None}
            rows.append(Row(about, tokens.half(), pooled(tokens).half(), b""))
        write_part(folder / "parts" / f"{first // MOST_ROWS:06d}.safetensors", rows)


def measure(index: Index, given: argparse.Namespace, centres: torch.Tensor) -> Json:
    """Times of queries, and how often the image is found that a query was made of."""
    rng = np.random.default_rng(1)
    seconds, first_seconds, found, first_found = [], [], 0, 0
    shape = (given.tokens, given.width)
    for number in rng.integers(len(index), size=given.queries).tolist():
        tokens = tokens_of(number, shape, centres)[: given.query_tokens]
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(number + 1))
        tokens = F.normalize(tokens + 0.3 * noise / given.width**0.5, dim=-1)
        query = Query(tokens, pooled(tokens), torch.full((len(tokens),), 1 / len(tokens)))
        began = time.perf_counter()
        near, _ = index.store.nearest(query.pooled.numpy(), given.candidates)
        first_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        hits = index.rank(query, 10, given.candidates)
        seconds.append(time.perf_counter() - began)
        found += hits[0].id == str(number)
        key = (number // MOST_ROWS << ROW_BITS) + number % MOST_ROWS
        first_found += key in near.tolist()
    return {
        "queries_per_second": len(seconds) / sum(seconds),
        "p50_ms": 1e3 * float(np.median(seconds)),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "first_stage_ms": 1e3 * float(np.median(first_seconds)),
        "among_candidates": first_found / len(seconds),
        "found_first": found / len(seconds),
    }


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=77, help="of an image")
    parser.add_argument("--width", type=int, default=128, help="of a token")
    parser.add_argument("--query-tokens", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="keeps the index")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    pipe = VLVPipeline.from_pretrained("vlv-tiny", parts=["search"])
    D = pipe.decoder.text_width
    space = PlainSpace(torch.zeros(D), torch.zeros(D, given.width))
    centres = torch.randn(CLUSTERS, given.width, generator=torch.Generator().manual_seed(0))
    centres = F.normalize(centres, dim=-1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "index"
        began = time.perf_counter()
        if not (folder / "index.json").exists():
            begin_index(folder, ModelName("vlv-tiny"), pipe, space)
            fill(folder, given.num, (given.tokens, given.width), centres)
        written = time.perf_counter() - began
        began = time.perf_counter()
        update_graph(folder, read_parts(folder / "parts")[0])
        about = {"write_s": written, "graph_s": time.perf_counter() - began}
        began = time.perf_counter()
        index = Index(folder, pipe)
        about["open_s"] = time.perf_counter() - began
        about |= {"num": len(index), **measure(index, given, centres)}
    for name, value in about.items():
        print(f"{name:20} {value:.4g}")
    if given.json is not None:
        write_json(given.json, about)


if __name__ == "__main__":
    main()
