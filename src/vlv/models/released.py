"""Models that others have released: downloaded, converted and kept, by a short name such as ``vlv-3b``.

```
ASSETS/vlv/vlv-3b/             the converted model, an ordinary model folder; sources.json names the commits
ASSETS/vlv/vlv-3b.download/    what has come so far; removed once the model is there
```
ASSETS is the assets cache of huggingface_hub, beside its cache of repositories. U-Net and VAE, which the authors do not train,
are only named in the model, and lie in the cache of repositories once something was drawn.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from huggingface_hub import constants
from torch import Tensor

from vlv.config import load_settings
from vlv.config_files import RELEASED, known_repositories
from vlv.config_sections import PartSource, Settings
from vlv.errors import CheckpointError, ModelFolderError
from vlv.models.card import Origin
from vlv.models.folder import (
    INDEX_NAME,
    Reference,
    component_folder,
    read_index,
    released_folder,
)
from vlv.models.hub import read_of
from vlv.models.official import convert_official
from vlv.models.official_files import is_weights, read_shard_index, usual_weights
from vlv.models.official_parts import Components
from vlv.models.transfer import PARTIAL, RemoteFile, Repository, fetch, look_up
from vlv.models.vetting import check_memory
from vlv.storage import lock, remove_temporaries, write_json

SOURCES_NAME = "sources.json"
DRAWING = ("unet", "vae")
"""The components that a converted model only names."""
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_FLORENCE = ("config.json", "preprocessor_config.json")
_DIFFUSION = (
    *("text_encoder/config.json", "unet/config.json", "vae/config.json"),
    "scheduler/scheduler_config.json",
)
_LLM = ("config.json",)


class ReleasedModel(Settings):
    """A released checkpoint, and the models that it was built from."""

    about: str
    """What it is, in a few words."""
    checkpoint: PartSource
    """Repository of the checkpoint."""
    florence: PartSource
    """Florence-2: configuration and tokenizer, and weights that the checkpoint leaves out."""
    diffusion: PartSource
    """Stable Diffusion: the same of the text tower; U-Net and VAE where something is drawn."""
    llm: PartSource
    """Language model: configuration and tokenizer."""

    @property
    def repositories(self) -> tuple[str, ...]:
        """All that something is taken from."""
        parts = (self.checkpoint, self.florence, self.diffusion, self.llm)
        return tuple(part.path for part in parts)


def released_model(name: str) -> ReleasedModel:
    """What is known of a released model without asking anybody."""
    return load_settings(ReleasedModel, name, folders=(RELEASED,))


def known_licence(repo: str) -> str:
    """The licence of a repository as the package knows it; empty where it does not."""
    return next((str(r["licence"]) for r in known_repositories() if repo in r["ids"]), "")


@dataclass(frozen=True)
class Need:
    """What is needed of one repository."""

    repository: Repository
    purpose: str
    files: tuple[RemoteFile, ...]
    perhaps: tuple[RemoteFile, ...] = ()
    """Weights of frozen parts, in case that the checkpoint leaves them out."""

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)

    @property
    def licence(self) -> str:
        """By its card, or as the package knows it."""
        return self.repository.licence or known_licence(self.repository.name) or "licence unknown"


@dataclass(frozen=True)
class Plan:
    """What a released model still needs before it can be loaded."""

    name: str
    about: str
    folder: Path
    needs: tuple[Need, ...]
    kept: int
    """Bytes of the converted model; 0 where it is there already."""
    room: int
    """Bytes that are free."""
    here: int = 0
    """Bytes that an earlier download left."""

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(need.size for need in self.needs) - self.here

    @property
    def perhaps(self) -> int:
        """Bytes more where the checkpoint leaves out its frozen parts."""
        return sum(file.size for need in self.needs for file in need.perhaps)

    @property
    def licences(self) -> list[str]:
        """Of the repositories, each once."""
        return list(dict.fromkeys(need.licence for need in self.needs))

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        yield f"{self.name}: {self.about}"
        width = max(len(need.repository.name) for need in self.needs)
        for need in self.needs:
            size = f"{_gigabytes(need.size):>10}"
            yield f"  {need.repository.name:<{width}} {size}  {need.licence}  ({need.purpose})"
        resumed = f", {_gigabytes(self.here)} of it here already" if self.here else ""
        kept = f"; {_gigabytes(self.kept)} stay in {self.folder}" if self.kept else ""
        yield f"  to download: {_gigabytes(self.size)}{resumed}{kept}; free: {_gigabytes(self.room)}"
        if self.perhaps:
            yield f"  up to {_gigabytes(self.perhaps)} more if the checkpoint leaves out what was not trained"


def _gigabytes(count: float) -> str:
    """A size for people.

    >>> _gigabytes(8_612_000_000), _gigabytes(1_840_000), _gigabytes(12)
    ('8.61 GB', '1.8 MB', '0.0 MB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def fetch_released(
    name: str,
    *,
    tasks: Iterable[str] | None = None,
    revision: str | None = None,
    agree: Callable[[Plan], None],
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """See that a released model is on this machine: downloaded, converted, ready to be loaded. Without need, no network.

    Args:
        name: One of `released_names`.
        tasks: What it is for; drawing needs more. None is all that it can.
        revision: Of the checkpoint's repository.
        agree: Is shown what would be downloaded, and raises to refuse.
        report: Receives what is being downloaded, and of how many bytes how many are here.

    Returns:
        The model folder.

    Raises:
        ModelFolderError: Something cannot be had, or there is no room for it.
        CheckpointError: The checkpoint cannot be converted; what was downloaded is kept.
    """
    model, folder = released_model(name), released_folder(name, revision)
    drawn = tasks is None or not {"reconstruct", "generate"}.isdisjoint(tasks)
    if _is_ready(folder, drawn):
        return folder
    if constants.HF_HUB_OFFLINE:
        raise ModelFolderError(
            f"HF_HUB_OFFLINE is set, and {name} is not whole in {folder}; unset it and give the same command again, or "
            "copy that folder from a machine that has it"
        )
    with lock(folder.parent / ".lock", f"{folder.parent}", mend="wait for it"):
        if not (folder / INDEX_NAME).is_file():
            _Making(name, model, folder, revision).make(drawn, agree, report)
        elif not _is_ready(folder, drawn):
            _agree_to_draw(name, model, folder, agree)
        if drawn:
            for part in DRAWING:
                component_folder(read_index(folder), part)
    return folder


def is_cached(name: str, revision: str | None = None) -> bool:
    """Whether a released model is on this machine, ready to caption."""
    return (released_folder(name, revision) / INDEX_NAME).is_file()


def _is_ready(folder: Path, drawn: bool) -> bool:
    if not (folder / INDEX_NAME).is_file():
        return False
    if drawn:
        try:
            for part in DRAWING:
                component_folder(read_index(folder), part, local_files_only=True)
        except ModelFolderError:
            return False
    return True


def _agree_to_draw(
    name: str, model: ReleasedModel, folder: Path, agree: Callable[[Plan], None]
) -> None:
    """Ask before U-Net and VAE are added to a model that so far has only captioned."""
    reference = read_index(folder).components[DRAWING[0]] or {}
    repository = look_up(model.diffusion.path, reference.get("revision"))
    cache = Path(constants.HF_HUB_CACHE)
    plan = Plan(name, model.about, folder, (_drawing(repository),), 0, _free(cache))
    _check_room(plan, plan.size, cache)
    agree(plan)


def _drawing(repository: Repository) -> Need:
    names = [name for part in DRAWING for name in read_of(repository.files, part)]
    files = tuple(repository.files[name] for name in names)
    return Need(repository, "U-Net and VAE, to draw images", files)


class _Making:
    """One download and conversion.

    Args:
        name: Of the model.
        model: What it is made of.
        folder: Where it goes.
        revision: Of the checkpoint's repository.
    """

    def __init__(self, name: str, model: ReleasedModel, folder: Path, revision: str | None) -> None:
        self.name, self.model, self.folder = name, model, folder
        self.work = folder.with_name(f"{folder.name}.download")
        self.checkpoint = look_up(model.checkpoint.path, revision or model.checkpoint.revision)
        self.florence, self.diffusion, self.llm = (
            look_up(part.path, part.revision)
            for part in (model.florence, model.diffusion, model.llm)
        )

    def make(
        self, drawn: bool, agree: Callable[[Plan], None], report: Callable[[str, int, int], None]
    ) -> None:
        """Download and convert."""
        remove_temporaries(self.folder.parent)
        start, weights = self._weights_of(self.checkpoint)
        needs = self._needs(weights)
        here = sum(min(file.size, self._come(file)) for need in needs for file in need.files)
        shown = (*needs, _drawing(self.diffusion)) if drawn else needs
        kept = needs[0].size
        plan = Plan(self.name, self.model.about, self.folder, shown, kept, _free(self.folder), here)
        _check_room(plan, plan.size + kept, self.folder)
        check_memory(self.folder, kept)
        agree(plan)
        total, done = sum(need.size for need in needs), 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            report("download", done, total)

        for need in needs:
            for file in need.files:
                fetch(file, self._path(file), count)
        self._convert(self._path(start))

    def _needs(self, weights: tuple[RemoteFile, ...]) -> tuple[Need, ...]:
        """All but what is only needed to draw."""
        florence, diffusion = self.florence, self.diffusion
        return (
            Need(self.checkpoint, "the trained model", weights),
            Need(
                florence,
                "configuration and tokenizer",
                self._chosen(florence, _FLORENCE, ""),
                self._frozen(florence, ""),
            ),
            Need(
                diffusion,
                "configuration and tokenizer",
                self._chosen(diffusion, _DIFFUSION, "tokenizer"),
                self._frozen(diffusion, "text_encoder"),
            ),
            Need(self.llm, "configuration and tokenizer", self._chosen(self.llm, _LLM, "")),
        )

    def _chosen(
        self, repository: Repository, needed: tuple[str, ...], tokenizer: str
    ) -> tuple[RemoteFile, ...]:
        """Configurations and the files of a tokenizer; refused before any download where they are missing."""
        start = f"{tokenizer}/" if tokenizer else ""
        wanted = [f"{start}{name}" for name in _TOKENIZER if f"{start}{name}" in repository.files]
        missing = [name for name in needed if name not in repository.files]
        if not {f"{start}tokenizer.json", f"{start}merges.txt"} & set(wanted):
            missing.append(f"{start}tokenizer.json")
        if missing:
            raise ModelFolderError(
                f"the repository {repository.name} has no {missing[0]}, which {self.name} needs; it may have changed: "
                "see `vlv convert official` for folders of your own"
            )
        return tuple(repository.files[name] for name in (*needed, *wanted))

    def _frozen(self, repository: Repository, folder: str) -> tuple[RemoteFile, ...]:
        name = usual_weights(repository.names_in(folder))
        return () if name is None else (repository.files[_joined(folder, name)],)

    # --- weights ---------------------------------------------------------------------------------

    def _weights_of(self, repository: Repository) -> tuple[RemoteFile, tuple[RemoteFile, ...]]:
        """What `read_tensors` is to be given of a repository, and all the files that this takes."""
        folders = sorted({str(PurePosixPath(n).parent) for n in repository.files if is_weights(n)})
        found = [name for folder in folders if (name := self._main(repository, folder))]
        top = [name for name in found if "/" not in name]
        if len(top or found) != 1:
            names = ", ".join(sorted(filter(is_weights, repository.files))[:5]) or "no weights"
            raise ModelFolderError(
                f"it is not clear which file of {repository.name} is the checkpoint (found: {names}); download the one you "
                "want with `hf download`, and see `vlv convert official`"
            )
        start = repository.files[(top or found)[0]]
        return start, self._with_shards(repository, start)

    def _main(self, repository: Repository, folder: str) -> str | None:
        """The checkpoint in a folder of a repository: by its usual name, or the only one."""
        folder = "" if folder == "." else folder
        names = repository.names_in(folder)
        name = usual_weights(names)
        if name is None:
            others = [one for one in names if is_weights(one)]
            name = others[0] if len(others) == 1 else None
        return None if name is None else _joined(folder, name)

    def _with_shards(self, repository: Repository, start: RemoteFile) -> tuple[RemoteFile, ...]:
        """A file, or an index (which is fetched: it is small) with its shards."""
        if not start.name.endswith(".json"):
            return (start,)
        fetch(start, self._path(start), lambda count: None)
        folder = str(PurePosixPath(start.name).parent)
        names = {
            _joined("" if folder == "." else folder, shard)
            for shard in read_shard_index(self._path(start)).values()
        }
        if missing := sorted(names - set(repository.files)):
            raise ModelFolderError(
                f"{start.name} of {repository.name} names {missing[0]}, which the repository does not hold; it is not "
                "complete: try again later, or name another revision"
            )
        return (start, *(repository.files[name] for name in sorted(names)))

    # --- on this machine -------------------------------------------------------------------------

    def _path(self, file: RemoteFile) -> Path:
        """Where a file goes; those of another commit lie elsewhere."""
        return self._home(file.repo, file.commit) / file.name

    def _home(self, repo: str, commit: str) -> Path:
        return self.work / f"{repo.replace('/', '--')}@{commit[:12]}"

    def _come(self, file: RemoteFile) -> int:
        """Bytes of a file that are here already."""
        path = self._path(file)
        for one in (path, path.with_name(path.name + PARTIAL)):
            with suppress(OSError):
                return one.stat().st_size
        return 0

    def _convert(self, checkpoint: Path) -> None:
        """Write the model folder, and remove what it was made from."""
        florence, diffusion, llm = (
            self._home(one.name, one.commit) for one in (self.florence, self.diffusion, self.llm)
        )
        components = _OnDemand(florence, diffusion, llm, bring=self._bring)
        try:
            convert_official(
                checkpoint,
                components,
                self.folder,
                dtype=None,
                references=self._references(),
                origins=self._origins(),
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.name} cannot be converted: {error}; what was downloaded is kept for `vlv convert official`"
            ) from error
        repositories = (self.checkpoint, self.florence, self.diffusion, self.llm)
        write_json(self.folder / SOURCES_NAME, {one.name: one.commit for one in repositories})
        shutil.rmtree(self.work, ignore_errors=True)

    def _bring(self, part: str) -> None:
        """Fetch the weights of a frozen part, which the checkpoint turned out to lack."""
        repository, folder = {
            "encoder": (self.florence, ""),
            "text_encoder": (self.diffusion, "text_encoder"),
        }[part]
        for start in self._frozen(repository, folder):
            for file in self._with_shards(repository, start):
                fetch(file, self._path(file), lambda count: None)

    def _references(self) -> dict[str, Reference]:
        where = {"repo": self.diffusion.name, "revision": self.diffusion.commit}
        return {part: {**where, "subfolder": part} for part in DRAWING}

    def _origins(self) -> dict[str, Origin]:
        """Of each component: what was trained is under the checkpoint's licence."""
        trained, frozen = self.checkpoint.licence, self.diffusion.licence
        parts = ("text_encoder", "tokenizer", "scheduler", *DRAWING)
        whole = self.checkpoint.name
        decoder = Origin((self.diffusion.name,), frozen or known_licence(self.diffusion.name))
        return dict.fromkeys(parts, decoder) | {
            "encoder": Origin((whole, self.florence.name), trained),
            "caption_decoder": Origin((whole, self.llm.name), trained),
        }


@dataclass(frozen=True)
class _OnDemand(Components):
    """Component folders whose weights come when they are asked for."""

    bring: Callable[[str], None] = field(default=lambda part: None)

    def weights(self, part: str) -> dict[str, Tensor] | None:
        """Tensors of a frozen part; none of those that the model only names."""
        if part in DRAWING:
            return None
        self.bring(part)
        return super().weights(part)


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def _check_room(plan: Plan, needed: int, folder: Path) -> None:
    if needed > plan.room:
        raise ModelFolderError(
            f"{plan.name} takes {_gigabytes(needed)} in {folder}, and {_gigabytes(plan.room)} are free; make room, or set "
            "HF_HOME to a folder on a larger disk"
        )
