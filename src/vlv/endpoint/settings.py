"""Settings of an endpoint: address, model, key, rate limits, retries."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from vlv.endpoint.secrets import check_address, check_fields, shown_variable, without_secrets
from vlv.errors import ConfigError
from vlv.storage import Json

logger = logging.getLogger(__name__)

_MOST = 10_000
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible address, the model asked there, and how hard it may be asked.

    Attributes:
        base_url: All that stands before ``/chat/completions``: ``https://api.openai.com/v1``.
        model: Name of the model, as the server knows it.
        key_env: Name of the environment variable that holds the key; None sends no key. The key itself is
            never stored.
        concurrency: Requests in flight at the same time.
        requests_per_minute: Most requests a minute; None sets no limit.
        tokens_per_minute: Most tokens a minute, of prompts and answers together; None sets no limit.
        connect_timeout: Seconds until a connection must stand.
        timeout: Seconds until an answer must be complete.
        retries: How often a request is repeated after an error that may pass.
        backoff: Seconds of the first wait; each further one may last twice as long, up to ``max_backoff``.
        max_backoff: Longest wait before a repetition, in seconds; ``Retry-After`` may demand more.
        patience: Seconds that rate limiting (429) may keep one request waiting before it counts as failed.
        failures_in_a_row: Requests that fail one after the other, without one answer between them, before
            the endpoint is given up.
        token_field: How the server calls the longest answer; some of OpenAI's models want the second.
        extra: Further fields of every request, such as ``{"reasoning_effort": "none"}``.

    Raises:
        ConfigError: The address is none, holds a password, or a number makes no sense.
    """

    base_url: str
    model: str
    key_env: str | None = None
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    connect_timeout: float = 10.0
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 0.5
    max_backoff: float = 60.0
    patience: float = 900.0
    failures_in_a_row: int = 50
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("no model is named for the endpoint")
        check_address(self.base_url, self.model)
        check_fields(self.extra)
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("concurrency", "failures_in_a_row"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 to {_MOST}")
        for name in ("connect_timeout", "timeout", "backoff", "max_backoff", "patience"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be above 0 and finite, or left out")
        if self.retries < 0:
            raise ConfigError(f"retries is {self.retries}; it must be 0 or more")

    @property
    def url(self) -> str:
        """Address of chat completions."""
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def read_key(self) -> str | None:
        """The key, from the environment.

        Raises:
            ConfigError: The variable is not set, or holds what no header can.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise ConfigError(
                f"the environment variable {shown_variable(self.key_env)}, which should hold the key, is not set"
            )
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("the key in the environment holds characters that no key has")
        parts = urlsplit(self.base_url)
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            logger.warning(
                "the key travels unencrypted to %s; https would protect it", parts.netloc
            )
        return key


CHANGEABLE: dict[str, type] = {
    "connect_timeout": float,
    "timeout": float,
    "retries": int,
    "backoff": float,
    "max_backoff": float,
    "patience": float,
    "failures_in_a_row": int,
    "token_field": str,
    "extra": dict,
}
"""The settings of an `Endpoint` that `read_changes` takes."""


def read_changes(changes: Sequence[str]) -> Json:
    """Further settings of an `Endpoint` from texts such as ``timeout=60``.

    Raises:
        ConfigError: A name is none of `CHANGEABLE`, or its value has the wrong type.
    """
    values: Json = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in CHANGEABLE:
            raise ConfigError(
                f"--set {without_secrets(change):.200}: name one of {', '.join(CHANGEABLE)}, as in timeout=60"
            )
        try:
            values[name] = _as(CHANGEABLE[name], yaml.safe_load(text))
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            kind = CHANGEABLE[name].__name__
            raise ConfigError(f"--set {without_secrets(change):.200}: this is no {kind}") from error
    return values


def _as(kind: type, value: Any) -> Any:
    """A value of a type; a number is never cut to fit."""
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError("no whole number")
    return kind(value)
