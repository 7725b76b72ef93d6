"""The tools of a model, asked by the protocol's own client."""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("mcp", reason='the tools need the package mcp: pip install "vlv[mcp]"')

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.shared.exceptions import MCPError

from tests.serve.conftest import MODEL, image, png, url
from vlv.data.images import load_bytes
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.mixing import mix_embeddings
from vlv.models.pipeline import VLVPipeline
from vlv.serve.settings import Limits, ServeSettings
from vlv.serve.tools import TOOLS, Roots, ToolServer

Ask = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An opened folder with two images, and a secret beside it."""
    opened = tmp_path / "opened"
    (opened / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "more/b.png")):
        (opened / name).write_bytes(png(image(number)))
    (tmp_path / "secret.png").write_bytes(png(image(9)))
    (opened / "link.png").symlink_to(tmp_path / "secret.png")
    return opened


def session(server: ToolServer, work: Callable[[Client], Awaitable[Any]]) -> Any:
    """Do something as the client of a server in this process."""

    async def run() -> Any:
        try:
            async with Client(server.server) as client:
                return await work(client)
        finally:
            await server.close()

    return asyncio.run(run())


@pytest.fixture
def ask(tiny_pipeline: VLVPipeline, folder: Path) -> Ask:
    """Call a tool of the miniature model."""

    def call(
        tool: str, pipe: Any = tiny_pipeline, limits: Limits | None = None, **given: Any
    ) -> Any:
        settings = ServeSettings(MODEL, limits=limits or Limits())
        server = ToolServer(lambda: pipe, settings, Roots([folder]))
        return session(server, lambda client: client.call_tool(tool, given))

    return call


def drawn(result: Any) -> Image.Image:
    """The image of an answer."""
    assert not result.is_error, result.content
    (content,) = result.content
    assert (content.type, content.mime_type) == ("image", "image/png")
    return Image.open(BytesIO(base64.b64decode(content.data)))


def assert_refused(result: Any, words: str) -> None:
    """An error in one sentence that tells nothing of the inside."""
    assert result.is_error
    (content,) = result.content
    assert words in content.text
    assert "\n" not in content.text
    assert "Traceback" not in content.text
    assert "secret" not in content.text


def test_search_is_a_tool_where_there_is_an_index(
    tiny_pipeline: VLVPipeline, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("usearch", reason="search needs the package usearch")
    from tests.search.support import telling_space
    from vlv.search.index import Index

    space = telling_space(tiny_pipeline, [folder / "a.png", folder / "more" / "b.png"])
    Index.build([folder], tmp_path / "index", tiny_pipeline, space=space)
    server = ToolServer(
        lambda: tiny_pipeline,
        ServeSettings(MODEL),
        Roots([folder]),
        lambda pipe: Index.open(tmp_path / "index", pipe),
    )

    async def work(client: Client) -> Any:
        listed = await client.list_tools()
        found = await client.call_tool("search", {"image": "a.png", "k": 2})
        return listed, found, await client.call_tool("search", {"text": " "})

    listed, found, refused = session(server, work)
    assert "search" in {tool.name for tool in listed.tools}
    first, _ = found.structured_content["data"]
    assert first["id"] == "a.png"
    assert str(folder / "a.png") in found.content[0].text
    assert_refused(refused, "not only spaces")


def test_what_there_is(tiny_pipeline: VLVPipeline) -> None:
    server = ToolServer(lambda: tiny_pipeline, ServeSettings(MODEL), Roots())
    listed = session(server, lambda client: client.list_tools())
    tools = {tool.name: tool for tool in listed.tools}
    assert set(tools) == {"caption", "ask", "reconstruct", "generate", "mix", "verify"}
    schema = tools["mix"].input_schema
    assert schema["required"] == ["images"]
    assert "model" not in schema["properties"]
    assert "below an opened folder" in str(schema["properties"]["images"])
    assert "nothing is fetched" not in str(schema)
    assert all(tool.annotations.read_only_hint for tool in tools.values())


@pytest.mark.parametrize("form", ["path", "absolute", "url", "base64"])
def test_captions_are_those_of_the_pipeline(
    ask: Ask, tiny_pipeline: VLVPipeline, folder: Path, form: str
) -> None:
    content = png(image(1))
    given = {
        "path": "more/b.png",
        "absolute": str(folder / "more" / "b.png"),
        "url": url(1),
        "base64": base64.b64encode(content).decode(),
    }[form]
    expected = tiny_pipeline.caption(load_bytes(content), max_new_tokens=8)
    result = ask("caption", image=given, max_tokens=8)
    assert [content.text for content in result.content] == [expected]
    (only,) = result.structured_content["captions"]
    assert only["caption"] == expected


def test_sampled_captions(ask: Ask, tiny_pipeline: VLVPipeline) -> None:
    asked = {"image": "a.png", "n": 3, "temperature": 1.5, "seed": 4, "max_tokens": 8}
    expected = tiny_pipeline.caption(
        [image(0)] * 3, do_sample=True, temperature=1.5, seed=4, max_new_tokens=8
    )
    found = ask("caption", **asked).structured_content["captions"]
    assert [one["caption"] for one in found] == expected


def test_images_are_those_of_the_pipeline(ask: Ask, tiny_pipeline: VLVPipeline) -> None:
    given = {"steps": 2, "seed": 3}
    expected = tiny_pipeline.reconstruct(image(0), **given)
    assert drawn(ask("reconstruct", image="a.png", **given)).tobytes() == expected.tobytes()
    expected = tiny_pipeline.generate("a red cube", **given)
    assert drawn(ask("generate", prompt="a red cube", **given)).tobytes() == expected.tobytes()
    z = mix_embeddings(list(tiny_pipeline.embed([image(0), image(1)])), keep=(3, 2))
    expected = tiny_pipeline.reconstruct(z=z, **given)
    result = ask("mix", images=["a.png", url(1)], keep=[3, 2], **given)
    assert drawn(result).tobytes() == expected.tobytes()
    assert result.structured_content == {"seed": 3}


def test_questions(ask: Ask, instructed_pipeline: VLVPipeline) -> None:
    given = {"image": "a.png", "question": "is it a cube?"}
    result = ask("ask", pipe=instructed_pipeline, **given)
    assert result.content[0].text == "yes"
    wanted = instructed_pipeline.ask(image(0), "is it a cube?").yes
    assert result.structured_content["yes"] == pytest.approx(wanted, abs=1e-4)
    assert_refused(ask("ask", **given), "was not taught to answer questions")


def test_verification(ask: Ask, tiny_pipeline: VLVPipeline) -> None:
    texts = ["a red cube", "a blue sphere"]
    expected = tiny_pipeline.score(image(0), texts)
    found = ask("verify", image="a.png", captions=texts).structured_content
    assert found["best"] == expected.best
    assert [row["score"] for row in found["data"]] == pytest.approx(list(expected.recovered))


@pytest.mark.parametrize(
    "given",
    [
        "../secret.png",
        "link.png",
        "/etc/passwd",
        "missing.png",
        "",
        ".",
        "more",
        "./" * 3000,
        "a\0b",
    ],
)
def test_no_file_but_those_of_opened_folders(ask: Ask, given: str) -> None:
    assert_refused(ask("caption", image=given), "image: there is no such file below a folder")


def test_images_that_are_refused(ask: Ask, folder: Path) -> None:
    (folder / "text.png").write_text("no image")
    assert_refused(ask("caption", image="text.png"), "image: the image")
    assert_refused(
        ask("caption", image="https://example.org/a.png"), "nothing is fetched; name a file"
    )
    assert_refused(ask("caption", image="data:image/png;base64,!"), "not valid base64")
    assert_refused(ask("mix", images=["a.png", "b.png"]), "images.1: there is no such file")


def test_limits_are_those_of_the_server(ask: Ask) -> None:
    limits = Limits(images=2, texts=2, characters=10, tokens=9, steps=3)
    for tool, given, words in (
        ("caption", {"image": "a.png", "max_tokens": 10}, "max_tokens is 10, above"),
        ("caption", {"image": "a.png", "n": 3}, "n is 3, above"),
        ("reconstruct", {"image": "a.png", "steps": 4}, "steps is 4, above"),
        ("generate", {"prompt": "a" * 11}, "prompt: a text has 1 to 10"),
        ("mix", {"images": ["a.png"] * 3, "steps": 1}, "the number of images is 3"),
        ("verify", {"image": "a.png", "captions": ["a"] * 3}, "captions is 3, above"),
        ("caption", {}, "image: Field required"),
        ("caption", {"image": "a.png", "beams": 4}, "beams: Extra inputs are not permitted"),
        ("caption", {"image": "a.png", "seed": -1}, "seed: Input should be greater"),
        ("mix", {"images": ["a.png"]}, "images: List should have at least 2"),
        ("mix", {"images": ["a.png", "a.png"], "keep": [1], "steps": 1}, "keep"),
    ):
        assert_refused(ask(tool, limits=limits, **given), words)


def test_a_tool_that_is_not_there(tiny_pipeline: VLVPipeline) -> None:
    server = ToolServer(lambda: tiny_pipeline, ServeSettings(MODEL), Roots())

    async def work(client: Client) -> None:
        with pytest.raises(MCPError, match="there is no such tool; the tools are caption"):
            await client.call_tool("delete", {})

    session(server, work)


def test_parts_that_are_missing(ask: Ask, tiny_folder: Path) -> None:
    captioner = VLVPipeline.from_pretrained(tiny_folder, parts=["caption"])
    assert not ask("caption", captioner, image="a.png", max_tokens=4).is_error
    assert_refused(ask("generate", captioner, prompt="a"), "has no part for this")


def test_a_model_that_cannot_be_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> Any:
        raise ModelFolderError("there is no model of that name; name another")

    server = ToolServer(load, ServeSettings(MODEL), Roots([folder]))

    async def work(client: Client) -> Any:
        assert len((await client.list_tools()).tools) == len(TOOLS)
        return [await client.call_tool("caption", {"image": "a.png"}) for _ in range(2)]

    for result in session(server, work):
        assert_refused(result, "there is no model of that name; name another")
    assert capsys.readouterr().err.count("there is no model of that name") == 1


def test_a_model_that_fails(ask: Ask, tiny_pipeline: VLVPipeline) -> None:
    class Broken:
        image_size, framing = tiny_pipeline.image_size, tiny_pipeline.framing

        def embed(self, *given: object, **more: object) -> None:
            raise RuntimeError("a secret of the inside")

    assert_refused(ask("caption", Broken(), image="a.png"), "the server failed")


def test_tools_are_listed_while_the_model_loads(tiny_pipeline: VLVPipeline, folder: Path) -> None:
    may_load = threading.Event()

    def load() -> VLVPipeline:
        assert may_load.wait(20)
        return tiny_pipeline

    server = ToolServer(load, ServeSettings(MODEL), Roots([folder]))

    async def work(client: Client) -> Any:
        calls = [
            asyncio.create_task(client.call_tool("caption", {"image": name, "max_tokens": 8}))
            for name in ("a.png", "more/b.png")
        ]
        assert len((await client.list_tools()).tools) == len(TOOLS)
        assert not any(call.done() for call in calls)
        may_load.set()
        return await asyncio.gather(*calls)

    texts = [result.content[0].text for result in session(server, work)]
    assert texts == tiny_pipeline.caption([image(0), image(1)], max_new_tokens=8)


def test_roots_are_folders(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder; name one that holds images"):
        Roots([folder / "a.png"])
    assert Roots().folders == ()


@pytest.fixture
def command(tiny_folder: Path, folder: Path) -> list[str]:
    given = ["-m", "vlv", "mcp", "--model", str(tiny_folder), "--root", str(folder)]
    return [*given, "--max-tokens", "8", "--timeout", "120"]


@pytest.mark.slow
def test_the_command_over_stdio(command: list[str], tiny_pipeline: VLVPipeline) -> None:
    parameters = StdioServerParameters(command=sys.executable, args=command, env=dict(os.environ))

    async def work() -> Any:
        async with Client(stdio_client(parameters)) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            good = await client.call_tool("caption", {"image": "a.png", "max_tokens": 8})
            bad = await client.call_tool("caption", {"image": "a.png", "max_tokens": 9})
            image = await client.call_tool("reconstruct", {"image": "a.png", "steps": 1})
            return names, good, bad, image

    names, good, bad, image_result = asyncio.run(work())
    assert "verify" in names
    assert good.content[0].text == tiny_pipeline.caption(image(0), max_new_tokens=8)
    assert_refused(bad, "above this server's limit of 8")
    assert drawn(image_result).size == (tiny_pipeline.image_size,) * 2
