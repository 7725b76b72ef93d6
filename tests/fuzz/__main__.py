"""Run cases by hand: `python -m tests.fuzz --cases 200000 --seed 1`; prints what came of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.runner import ROUND, fuzz
from tests.fuzz.targets import TARGETS


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=ROUND)
    parser.add_argument(
        "--folder", type=Path, help="keeps the bytes of findings; a new one by default"
    )
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="vlv-fuzz-"))
    began = time.monotonic()
    found = fuzz(given.cases, given.seed, folder, given.targets)
    kinds = (
        ("traceback", "tracebacks"),
        ("hang", "hangs"),
        ("crash", "crashes"),
        ("memory", "over the memory limit"),
        ("outside", "outside the folder"),
    )
    counts = ", ".join(f"{found.kinds[kind]} {plural}" for kind, plural in kinds)
    total = (
        f"{found.cases} cases in {time.monotonic() - began:.0f} s, {found.refused} refused; {counts}; "
        f"peak +{found.peak / 2**20:.0f} MiB; files of findings: {folder}"
    )
    sys.stdout.write("\n".join([*found.findings, total, ""]))


if __name__ == "__main__":
    main()
