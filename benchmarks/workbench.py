"""How soon does the workbench answer in a browser, and how much memory does a large folder take?

    python benchmarks/workbench.py --images 100000 --json benchmarks/results/workbench-cpu.json

`vlv ui` runs as a process of its own on a folder of small images, half of them with captions, and Chromium looks at it: first paint, the
first page of images, a folder that is opened, a filter over all captions, and the time from the key that saves to the file on the disk.
It needs `pip install "vlv[ui]" playwright` and a Chromium, from the path or from the environment variable CHROMIUM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from PIL import Image
from playwright.sync_api import sync_playwright

from vlv.training.journal import versions

if TYPE_CHECKING:
    from collections.abc import Callable

SAVES = 12
PATH, FILTER = (f"#vlv-{name} textarea, #vlv-{name} input" for name in ("path", "filter"))
CARDS = "[...document.querySelectorAll('.vlv-card img')].slice(0, 12)"
SHOWN = f"{CARDS}.length > 0 && {CARDS}.every(x => x.complete && x.naturalWidth)"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--model", default="vlv-tiny")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    if chromium is None:
        parser.error("there is no Chromium; install one, or name it in CHROMIUM")
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), options.images, options.model, chromium)
    for label, value in figures.items():
        print(f"{label:<44} {value:10,.0f}")
    if options.json:
        made_on = {k: v for k, v in versions().items() if k not in ("command", "platform")}
        about = {"images": options.images, "model": options.model, "versions": made_on}
        options.json.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


def measure(folder: Path, count: int, model: str, chromium: str) -> dict[str, float]:
    """All figures, in milliseconds and MiB."""
    small, large = folder / "small", folder / "large"
    make_folder(small, 24)
    make_folder(large, count)
    command = [sys.executable, "-m", "vlv", "ui", str(small), "--port", "0", "--model", model]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stderr=log, stdout=log)
    try:
        address = wait_for_address(folder / "log", server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            page.set_default_timeout(120_000)
            return look(page, address, small, large, count, psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait(60)


def make_folder(folder: Path, count: int) -> None:
    """Images of 256 pixels, every other one with a caption; few files with many names."""
    folder.mkdir()
    sources = []
    for number in range(20):
        image = folder.parent / f"{folder.name}{number}.png"
        Image.linear_gradient("L").rotate(18 * number).convert("RGB").save(image)
        text = f"A red cube number {number} stands left of a blue sphere. The floor is grey.\n"
        image.with_suffix(".txt").write_text(text)
        sources.append(image)
    for number in range(count):
        part = folder / f"{number // 10_000:02d}"
        part.mkdir(exist_ok=True)
        source, name = sources[number % len(sources)], part / f"{number:06d}.png"
        os.link(source, name)
        if number % 2 == 0:
            os.link(source.with_suffix(".txt"), name.with_suffix(".txt"))


def wait_for_address(log: Path, server: subprocess.Popen[Any]) -> str:
    """What `vlv ui` prints when it listens."""
    while server.poll() is None:
        if found := re.search(r"http://\S+", log.read_text()):
            return found[0]
        time.sleep(0.1)
    raise SystemExit(log.read_text())


def look(
    page: Any, address: str, small: Path, large: Path, count: int, server: psutil.Process
) -> dict[str, float]:
    """Use the page, and read the clock."""
    figures: dict[str, float] = {}
    page.wait_for_timeout(20_000)  # the model is loaded meanwhile
    figures["first images of the page (ms)"] = timed(
        lambda: (page.goto(address), page.wait_for_function(SHOWN))
    )
    paints = page.evaluate("performance.getEntriesByType('paint').map(x => x.startTime)")
    figures["first paint (ms)"] = min(paints)

    caption = small / "00" / "000000.txt"
    page.wait_for_timeout(3000)
    page.keyboard.press("e")
    page.wait_for_selector("#vlv-editor textarea:focus")
    saves = []
    for _ in range(SAVES):
        page.keyboard.type("!")
        page.wait_for_timeout(600)
        before = caption.stat().st_mtime_ns
        began = time.perf_counter()
        page.keyboard.press("Control+s")
        while caption.stat().st_mtime_ns == before:
            if time.perf_counter() > began + 30:
                page.screenshot(path="workbench.png")
                raise SystemExit("nothing was saved within 30 s; see workbench.png")
            time.sleep(0.001)
        saves.append(1000 * (time.perf_counter() - began))
        page.wait_for_timeout(900)
    figures["key to saved caption, median (ms)"] = statistics.median(saves)
    figures["key to saved caption, longest (ms)"] = max(saves)

    page.keyboard.press("Escape")
    before = server.memory_info().rss
    page.fill(PATH, str(large))
    told = f"document.querySelector('.vlv-where').innerText.includes('{count:,} images')"
    figures["folder opened (ms)"] = timed(
        lambda: (page.press(PATH, "Enter"), page.wait_for_function(f"{told} && {SHOWN}"))
    )
    page.fill(FILTER, "number 6 or words:=0")
    told = f"document.querySelector('.vlv-where').innerText.includes('of {count:,}')"
    figures["filter over all captions (ms)"] = timed(
        lambda: (page.press(FILTER, "Enter"), page.wait_for_function(told))
    )
    figures["memory of the server before (MiB)"] = before / 2**20
    figures["memory that the folder takes (MiB)"] = (server.memory_info().rss - before) / 2**20
    return figures


def timed(call: Callable[[], object]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
