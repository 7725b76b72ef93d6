"""Where an engine is, and how hard it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from vlv.endpoint import Endpoint
from vlv.errors import ConfigError
from vlv.models.arguments import finite, whole_number


@dataclass(frozen=True)
class EngineSettings:
    """An engine: started here with another interpreter, or running at an address.

    Raises:
        ConfigError: Not one of both is named, or a number is out of its range.
    """

    python: str | None = None
    """Interpreter of the environment that has vLLM."""
    url: str | None = None
    """Address of a running one, with /v1."""
    key_env: str | None = None
    """Environment variable that holds the key of the address; an engine that is started gets a random one."""
    arguments: tuple[str, ...] = ()
    """More arguments of ``vllm serve``."""
    concurrency: int = 256
    """Captions that are asked for at a time."""
    timeout: float = 600.0
    """Seconds until a caption must be there."""
    wait: float = 900.0
    """Seconds that an engine may take to start."""
    retries: int = 4
    """How often a caption is asked for again after an error that may pass."""

    def __post_init__(self) -> None:
        if (self.python is None) == (self.url is None):
            raise ConfigError(
                "an engine is started with --engine-python PATH or found at --engine-url URL; name one of both"
            )
        if self.url is None and self.key_env is not None:
            raise ConfigError("--engine-key-env has no effect without --engine-url")
        if self.python is None and self.arguments:
            raise ConfigError("--engine-arg has no effect without --engine-python")
        whole_number("concurrency", self.concurrency, 1)
        whole_number("retries", self.retries, 0)
        for name in ("timeout", "wait"):
            if finite(name, getattr(self, name)) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; choose more than 0")

    def endpoint(self, model: str, url: str | None = None) -> Endpoint:
        """The engine as an endpoint.

        Args:
            model: What it serves.
            url: Its address; None is `url` of the settings.
        """
        return Endpoint(
            url or self.url or "",
            model,
            key_env=self.key_env,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            max_backoff=10.0,
        )
