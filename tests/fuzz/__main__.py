"""Run cases by hand: `python -m tests.fuzz --cases 200000 --seed 1`; prints what came of them."""

from __future__ import annotations

import argparse
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
    time.monotonic()
    found = fuzz(given.cases, given.seed, folder, given.targets)
    for _line in found.findings:
        pass
    ", ".join(
        f"{found.kinds[kind]} {plural}"
        for kind, plural in (
            ("traceback", "tracebacks"),
            ("hang", "hangs"),
            ("crash", "crashes"),
            ("memory", "over the memory limit"),
            ("outside", "outside the folder"),
        )
    )


if __name__ == "__main__":
    main()
