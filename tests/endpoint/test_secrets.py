"""A key that was typed in a wrong place: refused, and neither repeated nor written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import write_image
from tests.endpoint.server import ScriptedServer, always
from vlv.cli import run
from vlv.endpoint import Endpoint, read_changes, split_spec, without_secrets
from vlv.errors import ConfigError

KEY = "sk-THISISSECRET0123456789"
PLAIN = "THISISSECRET"  # no library could tell it from a word

ADDRESSES = [
    f"http://me:{KEY}@127.0.0.1:1/v1",
    f"http://{KEY}@127.0.0.1:1/v1",
    f"http://me:{PLAIN}@127.0.0.1:1/v1",
    f"http://127.0.0.1:1/v1?key={PLAIN}",
    f"http://127.0.0.1:1/v1?{KEY}",
    f"http://127.0.0.1:1/v1#{KEY}",
    f"http://127.0.0.1:1/{KEY}/v1",
    f"ftp://me:{PLAIN}@127.0.0.1/v1",
    f"http://me:{PLAIN}@[127.0.0.1/v1",
    f"http://me:{PLAIN}@127.0.0.1:port/v1",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_key_is_refused_in_words_without_it(address: str) -> None:
    for make in (lambda: Endpoint(address, "m"), lambda: split_spec(f"m@{address}")):
        with pytest.raises(ConfigError) as caught:
            make()
        assert PLAIN not in str(caught.value)


def test_a_key_in_place_of_the_variable_is_not_repeated() -> None:
    for key in (KEY, "gsk_THISISSECRET0123456789", "AIzaTHISISSECRET", "thisissecret"):
        with pytest.raises(ConfigError, match="should hold the key, is not set") as caught:
            Endpoint("http://127.0.0.1:1/v1", "m", key_env=key).read_key()
        assert "secret" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "extra",
    [{"api_key": PLAIN}, {"a": {"Authorization": PLAIN}}, {"access_token": PLAIN}, {"a": [KEY]}],
)
def test_a_key_among_the_further_fields_is_refused(extra: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="extra holds a key") as caught:
        Endpoint("http://127.0.0.1:1/v1", "m", extra=extra)
    assert PLAIN not in str(caught.value)


def test_what_is_no_key_stays_as_it_is() -> None:
    for text in ("what? nothing = here", "a task-oriented key-value store", "http://host:1/v1", "x@y.z"):  # fmt: skip
        assert without_secrets(text) == text
    assert split_spec("org/model@latest@http://host:1/v1") == (
        "org/model@latest",
        "http://host:1/v1",
    )
    assert Endpoint("http://host/v1", "m", extra={"max_completion_tokens": 3}).extra


@pytest.mark.slow
@pytest.mark.parametrize("change", ["retries=1.5", "retries=true", "timeout=" + "[" * 5000])
def test_a_number_is_not_cut_to_fit(change: str) -> None:
    with pytest.raises(ConfigError, match="this is no"):
        read_changes([change])


def typed(folder: Path) -> list[list[str]]:
    """Command lines with a key in every place where one might be typed."""
    images, out, eval_run = folder / "images", folder / "out", folder / "run"
    teacher = ["data", "caption", images, "-o", out, "--model", "m", "--endpoint"]
    good = "http://127.0.0.1:1/v1"
    arena = ["eval", "predict", "arena", "--run-dir", eval_run, "--num", "2", "--from"]
    judge = ["eval", "judge", folder / "ready", "--judge"]
    found: list[list[object]] = []
    for address in ADDRESSES:
        found += [[*teacher, address], [*arena, f"endpoint:m@{address}"]]
        found += [[*judge, f"a=endpoint:m@{address}"], [*arena, f"endpiont:m@{address}"]]
        found += [["caption", address], ["info", address]]
    found += [
        [*teacher, good, "--key-env", KEY],
        [*teacher, good, "--set", f"extra={{api_key: {PLAIN}}}"],
    ]
    found += [
        [*arena, f"x=endpoint:m@{good}", "--key-env", KEY],
        [*teacher, good, "--set", f"key={KEY}"],
    ]
    found += [["data", "caption", images, "-o", out, "--model", KEY, "--endpoint", good]]
    return [[str(argument) for argument in arguments] for arguments in found]


@pytest.mark.slow
def test_no_key_is_written_or_echoed_wherever_it_was_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "images" / "a.png")
    ready = ["eval", "predict", "arena", "--run-dir", str(tmp_path / "ready"), "--from", "true", "--num", "2"]  # fmt: skip
    assert run(ready) == 0
    capsys.readouterr()
    for arguments in typed(tmp_path):
        assert run(arguments) == 1, arguments
        said = "".join(capsys.readouterr())
        assert PLAIN not in said, (arguments, said)
        assert "Traceback" not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in [*tmp_path.rglob("*")]:
        assert PLAIN not in path.name
    assert not [path for path in files if PLAIN.encode() in path.read_bytes()]


def test_a_key_of_the_environment_reaches_the_server_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    write_image(tmp_path / "images" / "a.png")
    with ScriptedServer(always(f"say A cube, as {KEY} says.")) as server:
        asked = ["--endpoint", server.url, "--model", "m", "--key-env", "SOME_KEY"]
        assert run(["data", "caption", str(tmp_path / "images"), "-o", str(tmp_path / "out"), *asked]) in (0, 2)  # fmt: skip
        assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in "".join(capsys.readouterr())
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
