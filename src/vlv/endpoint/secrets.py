"""Keys that were typed where none belongs: refused before anything is written, and never repeated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from vlv.errors import ConfigError

_USER = re.compile(r"(?<=//)[^/\s]*@")
_QUERY = re.compile(r"(?<=\S)\?[^\s'\"]*=[^\s'\"]*")
_KEY = re.compile(r"\b(?:sk|gsk|xai|hf|pplx|key)[-_][\w-]{12,}")
_FIELD = re.compile(
    r"api.?key|authorization|secret|password|(access|auth|bearer).?token", re.IGNORECASE
)
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")

_MEND = "put the key into an environment variable and name that with --key-env"


def without_secrets(text: str) -> str:
    """A message without what looks like a key: users and queries of addresses, and keys by their first letters.

    >>> without_secrets("no http://me:pass@host/v1?key=1 of sk-0123456789abcdef")
    'no http://***@host/v1?*** of ***'
    """
    return _KEY.sub("***", _QUERY.sub("?***", _USER.sub("***@", text)))


def check_address(url: str, model: str) -> None:
    """Refuse an address that is none, or that holds a secret, in words that do not repeat it.

    Raises:
        ConfigError: It is one of these.
    """
    try:
        parts = urlsplit(url)
        is_web = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, or a port that is no number
        is_web = False
    if not is_web or not url.isprintable():
        raise ConfigError(
            f"the endpoint {without_secrets(url)!r:.200} is no address; name one such as http://127.0.0.1:8000/v1"
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"the endpoint's address holds a user name or password; {_MEND}")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise ConfigError(
            f"the endpoint {parts.scheme}://{parts.hostname} must end before any ? or #; a key belongs into an "
            "environment variable that --key-env names"
        )
    if _KEY.search(url) or _KEY.search(model):
        raise ConfigError(f"the endpoint's address or model holds a key; {_MEND}")


def split_spec(spec: str) -> tuple[str, str]:
    """Model and address of ``MODEL@URL``.

    Raises:
        ConfigError: It is none, or holds a secret.

    >>> split_spec("qwen@http://127.0.0.1:8000/v1")
    ('qwen', 'http://127.0.0.1:8000/v1')
    """
    found = re.fullmatch(r"(.+?)@(https?://.*)", spec, re.DOTALL)
    if found is None:
        raise ConfigError(
            f'"{without_secrets(spec):.200}" is no endpoint; write MODEL@URL, such as qwen@http://127.0.0.1:8000/v1'
        )
    check_address(found[2], found[1])
    return found[1], found[2]


def check_fields(fields: Mapping[str, object]) -> None:
    """Refuse further fields of a request that hold a key, for they are written beside the results.

    Raises:
        ConfigError: One does.
    """
    for name, value in fields.items():
        if _FIELD.search(str(name)) or _KEY.search(str(value)):
            raise ConfigError(f"extra holds a key in {str(name)[:40]!r}; {_MEND}")
        if isinstance(value, Mapping):
            check_fields(value)


def shown_variable(name: str) -> str:
    """The name of an environment variable, unless it might be the key itself."""
    return name if _VARIABLE.fullmatch(name) else "that was named for the key"
