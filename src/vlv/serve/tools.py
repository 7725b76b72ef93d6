"""What a model can do as tools of the Model Context Protocol, over stdin and stdout.

Images come as files below folders that the user opened, or as base64, and go as PNG. The embedding itself is no tool: a language
model has no use for 77 x 1024 numbers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mcp_types as types
from mcp.server import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError
from pydantic import BaseModel, ValidationError

from vlv import __version__
from vlv.errors import ConfigError, VLVError
from vlv.progress import say
from vlv.serve import answers
from vlv.serve.errors import ApiError
from vlv.serve.images import is_address
from vlv.serve.requests import Requests
from vlv.serve.schema import (
    IMAGE,
    AskBody,
    CaptionBody,
    GenerateBody,
    MixBody,
    ReconstructBody,
    SearchBody,
    VerifyBody,
    first_fault,
)

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline
    from vlv.search.index import Index
    from vlv.serve.settings import ServeSettings

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_NOT_BELOW = "there is no such file below a folder that was opened with --root"


class Roots:
    """The folders whose images may be read.

    Args:
        folders: As the user named them.

    Raises:
        ConfigError: One is no folder.
    """

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        self.folders = tuple(folder.expanduser().resolve() for folder in folders)
        for folder in self.folders:
            if not folder.is_dir():
                raise ConfigError(f"--root {folder} is no folder; name one that holds images")

    async def find(self, given: str, name: str) -> str | Path:
        """The file of a path, or a data URL of what was given as base64.

        Args:
            given: A path, absolute or below one of the folders; or the image itself.
            name: The argument of the tool.

        Raises:
            ApiError: It is none of these, or lies elsewhere.
        """
        if given[:5].lower() == "data:":
            return given
        if is_address(given):
            raise ApiError(
                400, "nothing is fetched; name a file, or send the image itself", param=name
            )
        if (path := self._find(given)) is not None:
            return path
        if _BASE64.fullmatch(given):
            return f"data:image/unknown;base64,{''.join(given.split())}"
        raise ApiError(400, _NOT_BELOW, param=name)

    def _find(self, given: str) -> Path | None:
        """The file of a path, with links followed, if it lies below one of the folders."""
        for folder in self.folders:
            try:
                path = (folder / given).resolve(strict=True)
            except (OSError, ValueError):  # missing, too long, or no name at all
                continue
            if path.is_file() and any(path.is_relative_to(root) for root in self.folders):
                return path
        return None


@dataclass(frozen=True)
class Tool:
    """One tool: what it takes, and what it answers."""

    name: str
    about: str
    body: type[BaseModel]
    answer: Callable[[Requests, Any], Awaitable[types.CallToolResult]]

    def describe(self) -> types.Tool:
        """What a client is told of it."""
        schema = self.body.model_json_schema()
        schema["properties"].pop("model")
        text = json.dumps(schema).replace(
            json.dumps(IMAGE),
            json.dumps("Path of an image below an opened folder, a data: URL, or base64."),
        )
        return types.Tool(
            name=self.name,
            description=self.about,
            input_schema=json.loads(text),
            annotations=types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
        )


async def _caption(requests: Requests, body: CaptionBody) -> types.CallToolResult:
    captions = [caption for caption, _ in await requests.captions(body)]
    found = [
        {"caption": one.text, "tokens": one.num_tokens, "finished": one.finished}
        | ({"missing": list(one.missing)} if one.missing else {})
        for one in captions
    ]
    return _said("\n".join(one.text for one in captions), {"captions": found})


async def _ask(requests: Requests, body: AskBody) -> types.CallToolResult:
    found = await requests.ask(body)
    return _said(found.text, answers.answered(requests.settings.model, found))


async def _verify(requests: Requests, body: VerifyBody) -> types.CallToolResult:
    model = requests.settings.model
    if body.doubts:
        verdicts = answers.verdicts(model, await requests.doubts(body))
        return _said(json.dumps(verdicts["data"], ensure_ascii=False), verdicts)
    found = answers.scores(model, await requests.verify(body))
    lines = [f"{row['score']:.3f}  {row['caption']}" for row in found["data"]]
    return _said("\n".join(lines), found)


async def _search(requests: Requests, body: SearchBody) -> types.CallToolResult:
    hits = await requests.search(body)
    found = answers.hits(requests.settings.model, hits)
    return _said("\n".join(f"{hit.score:.3f}  {hit.file_name}" for hit in hits), found)


def _drawing(name: str) -> Callable[[Requests, Any], Awaitable[types.CallToolResult]]:
    async def draw(requests: Requests, body: Any) -> types.CallToolResult:
        image = await getattr(requests, name)(body)
        data = base64.b64encode(answers.png(image)).decode("ascii")
        return types.CallToolResult(
            content=[types.ImageContent(type="image", data=data, mime_type="image/png")],
            structured_content={"seed": requests.seed(body.seed)},
        )

    return draw


TOOLS = (
    Tool(
        "caption",
        "Describe an image in words. Without temperature the likeliest caption.",
        CaptionBody,
        _caption,
    ),
    Tool(
        "ask",
        "Answer a question about an image, if the model was taught to; yes is the probability of yes where the answer is yes or no.",
        AskBody,
        _ask,
    ),
    Tool(
        "reconstruct",
        "Draw an image anew from nothing but its caption embedding: what the model has seen in it.",
        ReconstructBody,
        _drawing("reconstruct"),
    ),
    Tool("generate", "Draw an image from a text.", GenerateBody, _drawing("generate")),
    Tool(
        "mix",
        "Draw one image from the caption embeddings of several: concat joins the leading vectors (keep says how many of "
        "each), average and slerp blend them by weights.",
        MixBody,
        _drawing("mix"),
    ),
    Tool(
        "verify",
        "Say how well captions explain an image to the frozen decoder: 1 explains as much as the embedding itself, 0 as much as "
        "no text; compare captions of one image.",
        VerifyBody,
        _verify,
    ),
)


SEARCH = Tool(
    "search",
    "Find the images of the index that are nearest to a text or to an image; the score is a mean cosine.",
    SearchBody,
    _search,
)
"""Where there is an index."""


class ToolServer:
    """The tools of one model, which is loaded while clients already ask what there is.

    Args:
        load: Loads the model.
        settings: How it is served, with the limits of `vlv serve`.
        roots: The folders whose images may be read.
        open_index: Opens the index that can be searched, once the model is loaded.
    """

    def __init__(
        self,
        load: Callable[[], VLVPipeline],
        settings: ServeSettings,
        roots: Roots,
        open_index: Callable[[VLVPipeline], Index] | None = None,
    ) -> None:
        self._load, self._settings, self._roots = load, settings, roots
        self._open_index = open_index
        tools = TOOLS if open_index is None else (*TOOLS, SEARCH)
        self._tools = {tool.name: tool for tool in tools}
        self._loading: asyncio.Future[Requests] | None = None
        self.server: Server[Any] = Server(
            "vlv",
            version=__version__,
            instructions=f"Captions, reconstructions and mixes of images by the model {settings.model}.",
            on_list_tools=self._list,
            on_call_tool=self._call,
        )

    def begin(self) -> asyncio.Future[Requests]:
        """Load the model in a thread, once."""
        if self._loading is None:
            loop = asyncio.get_running_loop()
            self._loading = loop.run_in_executor(ThreadPoolExecutor(1), self._start)
        return self._loading

    async def close(self) -> None:
        """End once what runs is finished."""
        if self._loading is not None and self._loading.done() and not self._loading.exception():
            await asyncio.to_thread(self._loading.result().close)

    async def serve_stdio(self) -> None:
        """Answer on stdout until stdin ends."""
        self.begin()
        try:
            async with stdio_server() as (read, write):
                await self.server.run(read, write, self.server.create_initialization_options())
        finally:
            await self.close()

    def _start(self) -> Requests:
        try:
            pipe = self._load()
            index = None if self._open_index is None else self._open_index(pipe)
            find = self._roots.find
            requests = Requests(pipe, self._settings, find_image=find, index=index)
        except VLVError as error:
            say(f"vlv: {error}")
            raise
        requests.batcher.start()
        return requests

    async def _list(self, context: object, params: object) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool.describe() for tool in self._tools.values()])

    async def _call(
        self, context: object, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        """Answer a call; whatever is wrong with it is one sentence, for the model that called to read."""
        tool = self._tools.get(params.name)
        if tool is None:
            known = ", ".join(self._tools)
            raise MCPError(types.INVALID_PARAMS, f"there is no such tool; the tools are {known}")
        try:
            body = tool.body.model_validate(params.arguments or {})
            requests = await asyncio.shield(self.begin())
            return await tool.answer(requests, body)
        except ValidationError as error:
            return _failed(first_fault(error.errors())[1])
        except VLVError as error:  # of loading: the work's own are ApiErrors
            return _failed(str(error))
        except ApiError as error:
            return _failed(f"{error.param}: {error.message}" if error.param else error.message)


def _said(text: str, values: Mapping[str, Any]) -> types.CallToolResult:
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=text)], structured_content=dict(values)
    )


def _failed(text: str) -> types.CallToolResult:
    said = types.TextContent(type="text", text=" ".join(text.split()))
    return types.CallToolResult(content=[said], is_error=True)
