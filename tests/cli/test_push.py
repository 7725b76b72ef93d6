"""`vlv push`, with a hub that is made up: the folder goes up whole, with its card under the new name."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from tests.cli.test_disk import files_of_at_most
from vlv.models import hub

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Vlv
    from vlv.models.pipeline import VLVPipeline


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub was given: repository, whether private, and the content of every file."""
    given: list[dict[str, Any]] = []

    class FakeHub:
        def __init__(self, token: str | None) -> None:
            assert token is None, "the stored login"

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
            assert exist_ok
            given.append({"repo": repo_id, "private": private})

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            assert repo_id == given[-1]["repo"]
            files = [path for path in folder_path.rglob("*") if path.is_file()]
            given[-1] |= {str(path.relative_to(folder_path)): path.read_bytes() for path in files}
            given[-1]["message"] = commit_message
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(hub, "HfApi", FakeHub)
    return given


def test_a_folder_goes_up_as_it_is(
    vlv: Vlv, tiny_folder: Path, uploads: list[dict[str, Any]]
) -> None:
    before = {p: p.read_bytes() for p in tiny_folder.rglob("*") if p.is_file()}
    result = vlv("push", tiny_folder, "me/model", "--private", "--message", "First")
    assert (result.code, result.out) == (0, "https://hub/me/model/commit/1\n")
    assert "the licence of encoder, text_encoder, tokenizer, unet, vae" in result.err
    (given,) = uploads
    assert (given["repo"], given["private"], given["message"]) == ("me/model", True, "First")
    names = {str(path.relative_to(tiny_folder)): content for path, content in before.items()}
    assert {k: v for k, v in names.items() if k != "README.md"}.items() <= given.items()
    card = given["README.md"].decode()
    assert "# me/model\n" in card
    assert 'from_pretrained("me/model")' in card
    assert {p: p.read_bytes() for p in before} == before, "the folder itself stays"


def test_the_shipped_model_names_every_licence(vlv: Vlv, uploads: list[dict[str, Any]]) -> None:
    result = vlv("push", "vlv-tiny", "me/tiny")
    assert (result.code, result.err) == (0, "")
    assert uploads[0]["private"] is None
    assert "inspector/config.json" in uploads[0]


def test_what_is_refused(
    vlv: Vlv, tiny_pipeline: VLVPipeline, tmp_path: Path, uploads: list[dict[str, Any]]
) -> None:
    assert "no model" in vlv("push", tmp_path, "me/model").err
    tiny_pipeline.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").unlink()
    assert "has no README.md; write one" in vlv("push", tmp_path / "m", "me/model").err
    vae = {"repo": str((tmp_path / "elsewhere").absolute()), "subfolder": None}
    tiny_pipeline.save_pretrained(tmp_path / "m", references={"vae": vae})
    (tmp_path / "elsewhere").mkdir()
    result = vlv("push", tmp_path / "m", "me/model")
    assert result.code == 1
    assert "the part vae is only named in" in result.err
    assert uploads == []


def test_a_hub_that_refuses(vlv: Vlv, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OfflineModeIsEnabled("offline mode\nis enabled")

    monkeypatch.setattr(hub.HfApi, "create_repo", offline)
    result = vlv("push", tiny_folder, "me/model")
    assert result.code == 1
    assert (
        "me/model cannot be uploaded (offline mode is enabled); name it as owner/name" in result.err
    )


def test_a_disk_without_room_for_the_card_is_one_sentence(
    vlv: Vlv,
    tiny_folder: Path,
    tmp_path: Path,
    uploads: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> None:
        result = vlv("push", tiny_folder, "me/model")
        assert result.code == 1
        assert "Errno" not in result.err
        assert uploads == []

    with files_of_at_most(10):
        refused()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "vanished", "/proc/vlv"):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(folder))
            refused()
    assert vlv("push", tiny_folder, "me/model").code == 0
    assert len(uploads) == 1
