"""Stands for vLLM in an interpreter of its own; needs the standard library alone, so it starts at once.

Its tokens are made of the prefix and the limit, so that a caption is the same whoever writes it, and when. `VLV_FAKE_ENGINE`
names a folder: the file `dies` holds how many captions each start writes before it ends, one number for each start.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOME = Path(os.environ.get("VLV_FAKE_ENGINE", ""))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def tokens(prefix: str, longest: int, end: int) -> list[int]:
    """What it writes: three tokens and the end."""
    digest = hashlib.sha256(prefix.encode()).digest()
    return [10 + digest[0] % 100, 10 + digest[1] % 100, 10 + digest[2] % 100, end][:longest]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    left: int | None = None
    name = ""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": self.name, "max_model_len": 500}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Handler.left is not None:
            Handler.left -= 1
            if Handler.left < 0:
                say("RuntimeError: out of luck")
                os._exit(3)
        ids = tokens(body["prompt_embeds"], body["max_tokens"], body["stop_token_ids"][0])
        reason = "stop" if ids[-1] == body["stop_token_ids"][0] else "length"
        self._answer({"choices": [{"token_ids": ids, "finish_reason": reason}]})

    def _answer(self, content: object) -> None:
        knows = self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        raw = json.dumps(content).encode()
        self.send_response(200 if knows else 401)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    arguments = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    starts = HOME / "starts"
    number = len(starts.read_text().split()) if starts.exists() else 0
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with starts.open("a") as file:
        file.write(f"{os.getpid()}-{helper.pid}\n")
    (HOME / "arguments").write_text(json.dumps(sys.argv[1:]))
    (HOME / "environment").write_text(json.dumps(dict(os.environ)))
    if (HOME / "fails").exists():
        say("(APIServer pid=7) ERROR 11-30 05:00:00 [core.py:1] ValueError: no such model")
        raise SystemExit("RuntimeError: Engine core initialization failed. See root cause above.")
    if (HOME / "hangs").exists():
        say("loading")
        time.sleep(600)
    if (HOME / "dies").exists():
        Handler.left = [int(n) for n in (HOME / "dies").read_text().split()][number]
    Handler.name = arguments["--served-model-name"]
    ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
