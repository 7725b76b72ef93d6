"""Logs as JSON lines on stderr: what was asked of which route, never what was in it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vlv.endpoint.secrets import without_secrets

requests = logging.getLogger("vlv.serve.requests")
_OURS = ("vlv", "uvicorn.error")


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with the fields that it was given as ``extra={"fields": ...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, in which nothing looks like a key."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": without_secrets(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


@contextmanager
def json_logs() -> Iterator[None]:
    """Write what vlv and its HTTP server have to say as JSON lines, for a while."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    before = {}
    for name in _OURS:
        logger = logging.getLogger(name)
        before[name] = (logger.handlers, logger.level, logger.propagate)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "vlv" else logging.ERROR)
    try:
        yield
    finally:
        for name, (handlers, level, propagate) in before.items():
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
