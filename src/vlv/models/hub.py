"""To and from the hub: only the files that are read, and one clear sentence where it cannot be."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlv.endpoint.secrets import without_secrets
from vlv.errors import ModelFolderError, OutputError
from vlv.models.calibration import CALIBRATION_NAME
from vlv.models.search_space import SPACE_NAME

_OTHER_FORMATS = ["*.bin", "*.pt", "*.msgpack", "*.h5", "*.ckpt", "*.onnx*", "*.non_ema.*"]
_VARIANTS = ("fp16", "bf16", "fp32")
_PLAIN = ["*model.safetensors", "*model.safetensors.index.json", "*model-*-of-?????.safetensors"]
_FULL = (errno.ENOSPC, errno.EDQUOT)


def download(
    repo: str,
    parts: Iterable[str] | None,
    revision: str | None,
    *,
    local_files_only: bool = False,
    subfolder: str | None = None,
    variant: str | None = None,
) -> Path:
    """Fetch a repository of the hub, or the folders of it that are named; what is cached is not fetched again.

    Args:
        repo: ``owner/name``.
        parts: Folders of components; None fetches all.
        revision: Commit, branch or tag.
        local_files_only: Look into the cache only.
        subfolder: Where in the repository the parts lie.
        variant: Of the weights, such as fp16; None is the plain files.

    Returns:
        The folder of the repository in the cache.

    Raises:
        ModelFolderError: It cannot be had; the message says why, and what to do.
    """
    inside = f"{subfolder}/" if subfolder else ""
    patterns = [f"{inside}*"] if subfolder else None
    if parts is not None:
        files = ("model_index.json", CALIBRATION_NAME, SPACE_NAME)
        patterns = [f"{inside}{name}" for name in (*files, *(f"{part}/*" for part in parts))]
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_unread(variant),
            local_files_only=local_files_only,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise refusal(repo, revision, error) from error
    except RuntimeError as error:  # the fast transfer does not pass on which error it was
        if "no space left" not in str(error).lower():
            raise
        raise refusal(repo, revision, OSError(errno.ENOSPC, str(error))) from error
    return Path(folder)


def read_of(names: Iterable[str], subfolder: str) -> list[str]:
    """The files of a repository that `download` fetches of a subfolder.

    >>> read_of(["vae/config.json", "vae/model.safetensors", "vae/model.bin", "unet/config.json"], "vae")
    ['vae/config.json', 'vae/model.safetensors']
    """
    unread = _unread(variant=None)
    inside = [name for name in names if name.startswith(f"{subfolder}/")]
    return [name for name in inside if not any(fnmatchcase(name, one) for one in unread)]


def _unread(variant: str | None) -> list[str]:
    """Patterns of the files that nothing here reads."""
    others = [f"*.{name}[.-]*" for name in _VARIANTS if name != variant]
    return [*_OTHER_FORMATS, *others, *(_PLAIN if variant else ())]


def upload(
    folder: Path, repo: str, message: str, *, private: bool | None, token: str | None
) -> str:
    """Upload a folder to ``owner/name``, which is created where it does not exist; the address of the commit.

    Raises:
        OutputError: The hub refuses, or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise OutputError(
            f"{repo} cannot be uploaded ({reason}); name it as owner/name, see that HF_HUB_OFFLINE is not set, and log "
            "in with `hf auth login` as somebody who may write there"
        ) from error
    return str(commit.commit_url)


def refusal(
    repo: str, revision: str | None, error: Exception, cache: Path | None = None
) -> ModelFolderError:
    """Why a repository cannot be had, in one sentence that says what to do.

    Args:
        repo: ``owner/name``.
        revision: Commit, branch or tag.
        error: What the hub's library, the network or the disk said.
        cache: Where its files were to go; None is the hub's own cache.
    """
    reason = without_secrets(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, OSError) and error.errno in _FULL:
        return ModelFolderError(
            f"the disk is full: {repo} does not fit into the cache {cache or constants.HF_HUB_CACHE}; make room, or set "
            "HF_HOME to a folder on a larger disk, and give the same command again"
        )
    match error:
        case GatedRepoError():
            what = "its owner asks for consent first"
            mend = (
                f"accept the terms at https://huggingface.co/{repo} and log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            what = "it was withdrawn or renamed, or is private"
            mend = "name a mirror or a local folder, or log in with `hf auth login`"
        case RevisionNotFoundError():
            what, mend = f"it has no revision {revision!r}", "name another revision"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            what = "HF_HUB_OFFLINE is set, and it is not in the cache"
            mend = (
                f"unset it, or run `hf download {repo}` where there is a network and copy the cache"
            )
        case LocalEntryNotFoundError():
            what = "it is not in the cache, and there is no connection"
            mend = f"check the name and the connection, or name a local folder with {repo} in it"
        case HFValidationError():
            what, mend = reason[:200], "name it as owner/name"
        case _:
            what, mend = reason[:200], "check the name, the revision and the connection"
    return ModelFolderError(
        f'there is no folder "{repo}", and the hub did not give a model of that name ({what}); {mend}'
    )


def check_variant(folder: Path, variant: str | None) -> None:
    """See that a component's folder has the weights that are asked for.

    Raises:
        ModelFolderError: It has another file variant only.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    found = {name: _variant_of(name) for name in names}
    if names and variant not in found.values():
        there = ", ".join(sorted({str(v) for v in found.values() if v})) or "the plain files only"
        wanted = f"no weights of the variant {variant}" if variant else "no plain weights"
        raise ModelFolderError(f"{folder} has {wanted}, but {there}; set variant accordingly")


def _variant_of(name: str) -> str | None:
    """The variant in the name of a file of weights.

    >>> _variant_of("model.fp16.safetensors"), _variant_of("model-00001-of-00002.safetensors")
    ('fp16', None)
    """
    middle = name.removesuffix(".safetensors").split(".")[1:]
    return middle[0].split("-")[0] if middle else None
