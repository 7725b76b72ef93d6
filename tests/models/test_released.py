"""A released model: downloaded from a hub on this machine, converted, kept; and whatever can go wrong on the way."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from tests import hub as hubs
from tests.hub import Hub, Repo
from tests.models import official_world as world
from tests.models.official_files import COMPONENTS, STAGE2, tensors
from vlv.errors import ConfigError, ModelFolderError, OutputError, VLVError
from vlv.models.folder import find_folder, read_index, released_folder
from vlv.models.hashing import weights_hash
from vlv.models.official import load_stage2
from vlv.models.pipeline import VLVPipeline
from vlv.models.released import Plan, fetch_released, is_cached, released_model
from vlv.storage import lock

NAME = "vlv-3b"
MODEL = released_model(NAME)
FORMS = [
    pytest.param(form, id=form.__name__, marks=[] if form is world.sharded else pytest.mark.slow)
    for form in world.FORMS
    if form is not world.old_format
]
PIECE = 2**16


def agree(plan: Plan) -> None:
    """Whatever it is."""


def refuse(plan: Plan) -> None:
    raise ConfigError("no, thank you")


def fetch(**settings: Any) -> Path:
    return fetch_released(NAME, **{"tasks": ["caption"], "agree": agree, **settings})


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hubs.running() as hub:
        yield hub


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Stable Diffusion with the weights of U-Net and VAE."""
    folder = tmp_path_factory.mktemp("diffusion")
    shutil.copytree(COMPONENTS / "stable-diffusion-2-1-base", folder, dirs_exist_ok=True)
    for part in ("unet", "vae"):
        state = {
            k.removeprefix(f"{part}."): v
            for k, v in tensors("stage1").items()
            if k.startswith(f"{part}.")
        }
        save_file(world.unshared(state), folder / part / "diffusion_pytorch_model.safetensors")
        (folder / part / "diffusion_pytorch_model.bin").write_bytes(b"nobody reads this" * 2000)
    return hubs.content_of(folder)


@pytest.fixture
def hub(
    server: Hub, diffusion: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Hub:
    """The repositories that vlv-3b is made of, in miniature."""
    server.requests.clear()
    server.breaks, server.pause = 0, 0.0
    server.repos = {
        MODEL.checkpoint.path: Repo({"model.safetensors": STAGE2.read_bytes(), "README.md": b"#"}),
        MODEL.florence.path: Repo(hubs.content_of(COMPONENTS / "Florence2large"), "mit"),
        MODEL.diffusion.path: Repo(dict(diffusion), "openrail++"),
        MODEL.llm.path: Repo(hubs.content_of(COMPONENTS / "Qwen2.5"), "other"),
    }
    hubs.point_to(server, monkeypatch, tmp_path)
    return server


@pytest.fixture(scope="module")
def expected() -> VLVPipeline:
    return load_stage2(STAGE2, COMPONENTS)


def assert_model(expected: VLVPipeline) -> VLVPipeline:
    """What is in the cache is the model."""
    pipe = VLVPipeline.from_pretrained(NAME, parts=["caption"])
    for part in ("encoder", "text_encoder", "caption_decoder"):
        assert weights_hash(getattr(pipe, part)) == weights_hash(getattr(expected, part))
    return pipe


def assert_refused(match: str, kind: type[VLVError] = ModelFolderError, **settings: Any) -> str:
    """One sentence, no secret in it, and no model that is half there."""
    with pytest.raises(kind, match=match) as caught:
        fetch(**settings)
    text = str(caught.value)
    assert "\n" not in text
    assert hubs.TOKEN not in text
    assert "signature=" not in text
    assert not is_cached(NAME)
    assert not list(released_folder(NAME).parent.glob(".*.vlv-tmp"))
    return text


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint(
    form: Any, hub: Hub, expected: VLVPipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    form(folder, tensors("stage2"))
    hub.repos[MODEL.checkpoint.path].files = hubs.content_of(folder)
    seen: list[tuple[int, int]] = []
    plans: list[Plan] = []
    model = fetch(agree=plans.append, report=lambda what, done, total: seen.append((done, total)))
    assert_model(expected)
    assert plans[0].size + plans[0].here == seen[-1][0] == seen[-1][1]
    assert [need.licence for need in plans[0].needs][1:] == ["mit", "openrail++", "other"]
    names = {path.name for path in model.parent.iterdir()}
    assert names == {".lock", NAME}, "nothing else stays"
    assert not any("diffusion_pytorch_model" in r.path for r in hub.requests)
    for request in hub.requests:  # the secret goes to the hub alone, not to its large storage
        assert not (request.host.startswith("localhost") and request.authorization)
    assert any(request.host.startswith("localhost") for request in hub.requests)
    assert any(request.authorization == f"Bearer {hubs.TOKEN}" for request in hub.requests)
    hub.requests.clear()
    assert fetch() == model
    assert find_folder(NAME) == model
    assert hub.requests == [], "what is in the cache needs no network"


@pytest.mark.slow
def test_a_folder_within_the_repository(hub: Hub, expected: VLVPipeline) -> None:
    repo = hub.repos[MODEL.checkpoint.path]
    repo.files = {"step_20000/model.safetensors": repo.files["model.safetensors"]}
    fetch()
    assert_model(expected)


@pytest.mark.slow
def test_the_dtype_of_the_checkpoint_is_kept(hub: Hub, tmp_path: Path) -> None:
    half = {k: v.to(torch.bfloat16) for k, v in tensors("stage2").items()}
    torch.save(half, tmp_path / "model.pt")
    hub.repos[MODEL.checkpoint.path].files = {"model.pt": (tmp_path / "model.pt").read_bytes()}
    folder = fetch()
    size = (folder / "caption_decoder" / "model.safetensors").stat().st_size
    pipe = VLVPipeline.from_pretrained(NAME, parts=["caption"])
    count = sum(p.numel() for p in pipe.caption_decoder.parameters())  # type: ignore[union-attr]
    assert size < 2.2 * count


@pytest.mark.slow
def test_frozen_weights_come_where_the_checkpoint_lacks_them(hub: Hub, tmp_path: Path) -> None:
    parts = world.write_components(tmp_path / "parts", world.SIZES[0])
    pipe = world.make_pipeline(parts, world.SIZES[0], seed=1)
    world.write_frozen(pipe, parts)
    torch.save(world.official_state(pipe, 2, frozen=False), tmp_path / "model.pt")
    hub.repos[MODEL.checkpoint.path].files = {"model.pt": (tmp_path / "model.pt").read_bytes()}
    hub.repos[MODEL.florence.path].files = hubs.content_of(parts.florence)
    hub.repos[MODEL.diffusion.path].files = hubs.content_of(parts.diffusion)
    assert parts.llm is not None
    hub.repos[MODEL.llm.path].files = hubs.content_of(parts.llm)
    plans: list[Plan] = []
    fetch(agree=plans.append)
    assert plans[0].perhaps > 0
    assert any("up to" in line for line in plans[0].lines())
    assert_model(pipe)


@pytest.mark.slow
def test_drawing_brings_the_decoder(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch()
    with pytest.raises(ConfigError, match="no, thank you"):
        fetch(tasks=["generate"], agree=refuse)
    assert is_cached(NAME), "it captions as before"
    plans: list[Plan] = []
    folder = fetch(tasks=["reconstruct"], agree=plans.append)
    assert [need.purpose for need in plans[0].needs] == ["U-Net and VAE, to draw images"]
    assert not hub.sent("diffusion_pytorch_model.bin")
    repository = hub.repos[MODEL.diffusion.path]
    assert (read_index(folder).components["unet"] or {})["revision"] == repository.commit
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(tasks=None) == folder
    pipe = VLVPipeline.from_pretrained(NAME)
    image = pipe.reconstruct(torch.rand(3, 64, 64), steps=1)
    assert image.size == (64, 64)
    assert hub.requests == []


@pytest.mark.slow
def test_both_at_once(hub: Hub) -> None:
    plans: list[Plan] = []
    fetch(tasks=None, agree=plans.append)
    assert len(plans) == 1
    assert len(plans[0].needs) == 5
    hub.requests.clear()
    VLVPipeline.from_pretrained(NAME)
    assert hub.requests == []


# --- connections that break -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_connection_that_breaks_is_taken_up_again(
    hub: Hub, expected: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.breaks, hub.break_after = 2, 5 * PIECE
    fetch()
    assert_model(expected)
    starts = [request.start for request in hub.sent("/store/" + _stored("model.safetensors"))]
    assert starts == [0, 5 * PIECE, 10 * PIECE]


@pytest.mark.slow
def test_one_that_breaks_for_good_is_taken_up_by_the_next_process(
    hub: Hub, expected: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(seconds: float) -> None:
        hub.breaks, hub.break_after = 10**6, 0

    hub.breaks, hub.break_after = 1, 8 * PIECE
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", die)
        assert_refused("broke off .* what has come is kept, and the same command goes on")
    hub.breaks = 0
    hub.requests.clear()
    plans: list[Plan] = []
    fetch(agree=plans.append)
    assert plans[0].here == 8 * PIECE
    assert any("here already" in line for line in plans[0].lines())
    (again,) = hub.sent("/store/" + _stored("model.safetensors"))
    assert again.start == 8 * PIECE
    assert_model(expected)


@pytest.mark.slow
def test_a_killed_download_goes_on(hub: Hub, expected: VLVPipeline) -> None:
    hub.pause = 0.05
    work = released_folder(NAME).with_name(f"{NAME}.download")
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            fetch()
        os._exit(1)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= PIECE for path in work.rglob("model.safetensors.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (partial,) = work.rglob("*.part")
    size = partial.stat().st_size
    hub.pause = 0.0
    hub.requests.clear()
    fetch()
    (again,) = hub.sent("/store/" + _stored("model.safetensors"))
    assert again.start == size
    assert_model(expected)


@pytest.mark.slow
def test_a_slow_server_is_waited_for(hub: Hub, expected: VLVPipeline) -> None:
    hub.pause = 0.005
    fetch()
    assert_model(expected)


def test_a_dead_server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused("the hub did not give a model of that name .*check the name")


def _stored(name: str) -> str:
    return f"{MODEL.checkpoint.path}/{name}"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(hub: Hub, status: int) -> None:
    hub.repos[MODEL.checkpoint.path].refuse = (status, "GatedRepo")
    assert_refused("accept the terms at https://huggingface.co/lambertxiao/.* and log in")


def test_a_repository_that_is_gone(hub: Hub) -> None:
    del hub.repos[MODEL.llm.path]
    assert_refused('"Qwen/Qwen2.5-3B", and .*withdrawn or renamed, or is private')


def test_a_hub_that_fails(hub: Hub) -> None:
    hub.repos[MODEL.florence.path].gone = (500, "")
    assert_refused("the hub did not give a model of that name")


def test_a_file_that_is_gone(hub: Hub) -> None:
    hub.repos[MODEL.checkpoint.path].absent.add("model.safetensors")
    assert_refused("lambertxiao/.*Entry Not Found")


def test_a_configuration_that_is_gone(hub: Hub) -> None:
    del hub.repos[MODEL.florence.path].files["preprocessor_config.json"]
    assert_refused("microsoft/Florence-2-large has no preprocessor_config.json")
    assert not hub.sent("safetensors"), "before anything large is fetched"


def test_a_shard_that_is_gone(hub: Hub, tmp_path: Path) -> None:
    world.sharded(tmp_path, tensors("stage2"))
    files = hubs.content_of(tmp_path)
    del files["model-00002-of-00003.safetensors"]
    hub.repos[MODEL.checkpoint.path].files = files
    assert_refused("names model-00002-of-00003.safetensors, which the repository does not hold")
    assert not hub.sent("of-00003.safetensors")


@pytest.mark.slow
def test_a_wrong_hash(hub: Hub, expected: VLVPipeline) -> None:
    for repo, name in (
        (MODEL.checkpoint.path, "model.safetensors"),
        (MODEL.llm.path, "config.json"),
    ):
        hub.repos[repo].lies.add(name)
        assert_refused(f"{name} of .* came with other bytes than the hub announced")
        hub.repos[repo].lies.clear()
    fetch()
    assert_model(expected)


def test_weights_that_are_not_clear(hub: Hub) -> None:
    repo = hub.repos[MODEL.checkpoint.path]
    content = repo.files.pop("model.safetensors")
    repo.files |= {"a.pt": content, "b.pt": content}
    assert_refused(r"it is not clear which file .* \(found: a.pt, b.pt\); download the one")
    repo.files = {"README.md": b"#"}
    assert_refused("found: no weights")


def test_a_checkpoint_of_something_else(hub: Hub, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(20_000)}, tmp_path / "model.safetensors")
    hub.repos[MODEL.checkpoint.path].files = hubs.content_of(tmp_path)
    text = assert_refused("vlv-3b cannot be converted: none of the 1 tensors", VLVError)
    assert "kept for `vlv convert official`" in text


def test_another_revision(hub: Hub) -> None:
    with pytest.raises(ModelFolderError, match="no revision 'v2'"):
        fetch(revision="v2")
    assert released_folder(NAME, "a/b").name == "vlv-3b@a--b"


def test_what_the_machine_cannot_hold(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
        assert_refused(r"vlv-3b takes 4\.\d MB in .*, and 3.0 MB are free; make room")
    with monkeypatch.context() as patch:
        patch.setenv("VLV_MEMORY_GB", "0.001")
        assert_refused("above the 0.0 GB of this machine")
    assert not hub.sent("safetensors")


def test_who_does_not_agree(hub: Hub) -> None:
    assert_refused("no, thank you", ConfigError, agree=refuse)
    assert not hub.sent("safetensors")


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused("HF_HUB_OFFLINE is set, and vlv-3b is not whole in")
    with pytest.raises(ModelFolderError, match="`vlv caption IMAGE --model vlv-3b --yes`"):
        VLVPipeline.from_pretrained(NAME)
    assert hub.requests == []


def test_one_process_at_a_time(hub: Hub) -> None:
    folder = released_folder(NAME).parent
    with lock(folder / ".lock", "x"):
        assert_refused("another process works in .*; wait for it", OutputError)
    (folder / ".0123.vlv-tmp").mkdir()
    assert_refused("no, thank you", ConfigError, agree=refuse)
    assert not (folder / ".0123.vlv-tmp").exists(), "left by a process that was killed"
