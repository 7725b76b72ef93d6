"""The model of the workbench and the one piece of long work that it does at a time, with progress and a stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from vlv.endpoint.secrets import without_secrets
from vlv.errors import ConfigError, VLVError

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline

logger = logging.getLogger(__name__)

MOST_FAILURES = 20
"""Of a piece of work that are kept to be shown."""


class StoppedError(Exception):
    """Raised inside of work that somebody stops; what was reported before is kept."""


class Work:
    """A piece of long work, seen from both sides: by the one who does it and by the one who waits.

    Args:
        what: What is done, such as "captioning".
        total: Of what; 0 where it is not known.

    Attributes:
        state: How it stands.
        done: How many are done.
        failures: Sentences about those that failed, the first ones.
        message: The closing line, or what it waits for.
    """

    def __init__(self, what: str, total: int = 0) -> None:
        self.what, self.total = what, total
        self.state: Literal["running", "done", "stopped", "failed"] = "running"
        self.done = 0
        self.failures: list[str] = []
        self.message = ""
        self._began = time.monotonic()
        self._stop = threading.Event()
        self.thread: threading.Thread | None = None

    def advance(self, count: int = 1, errors: Sequence[str | None] = ()) -> None:
        """So many more are done and kept.

        Raises:
            StoppedError: Somebody wants it to end here.
        """
        self.done += count
        self.message = ""
        room = MOST_FAILURES - len(self.failures)
        self.failures += [error for error in errors if error is not None][:room]
        self.check()

    def check(self) -> None:
        """Go on, unless somebody wants it to end.

        Raises:
            StoppedError: They do.
        """
        if self._stop.is_set():
            raise StoppedError

    def stop(self) -> None:
        """End it after what is computed just now."""
        self._stop.set()
        self.message = "stopping after the batch that runs"

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.state == "running"

    @property
    def line(self) -> str:
        """How it stands, in words."""
        if not self.is_running:
            return self.message
        of = f" of {self.total}" if self.total else ""
        line = f"{self.what}: {self.done}{of}" if self.total or self.done else self.what
        seconds = time.monotonic() - self._began
        if self.done and self.total and seconds > 1:
            left = (self.total - self.done) * seconds / self.done
            line += (
                f", about {left:.0f} s left" if left < 120 else f", about {left / 60:.0f} min left"
            )
        return f"{line} ({self.message})" if self.message else line


class Desk:
    """The model, loaded once, and the work that it does.

    Args:
        load: Loads the model.
    """

    def __init__(self, load: Callable[[], VLVPipeline]) -> None:
        self._load = load
        self._pipe: VLVPipeline | None = None
        self._loading = threading.Lock()
        self._starting = threading.Lock()
        self.work: Work | None = None

    def preload(self) -> None:
        """Load the model in the background, so that the first caption waits less."""
        threading.Thread(target=self._try_to_load, daemon=True).start()

    def _try_to_load(self) -> None:
        try:
            self.pipe()
        except (VLVError, OSError) as error:  # told again to the one who needs it
            logger.warning("%s", error)

    @property
    def ready(self) -> VLVPipeline | None:
        """The model if it is loaded."""
        return self._pipe

    def pipe(self) -> VLVPipeline:
        """The model.

        Raises:
            VLVError: It cannot be loaded.
        """
        with self._loading:
            if self._pipe is None:
                self._pipe = self._load()
            return self._pipe

    def start(self, what: str, do: Callable[[Work], str], total: int = 0) -> Work:
        """Begin a piece of work in a thread of its own.

        Args:
            what: What is done.
            do: Does it; calls `Work.advance`, and returns the closing line.
            total: Of what.

        Raises:
            ConfigError: Other work is not done yet.
        """
        with self._starting:
            if self.work is not None and self.work.is_running:
                raise ConfigError(f"{self.work.line}; wait for it, or stop it first")
            self.work = work = Work(what, total)
            work.thread = threading.Thread(target=self._run, args=(work, do), daemon=True)
            work.thread.start()
            return work

    def _run(self, work: Work, do: Callable[[Work], str]) -> None:
        try:
            message, state = do(work), "done"
        except StoppedError:
            message, state = f"stopped; {work.done} results are kept", "stopped"
        except VLVError as error:
            message, state = without_secrets(" ".join(str(error).split())), "failed"
        except MemoryError:
            message, state = "the memory of this machine is used up; take smaller batches", "failed"
        except Exception as error:
            logger.exception("%s failed", work.what)
            message, state = (
                f"{work.what} failed ({type(error).__name__}; the terminal says more)",
                "failed",
            )
        work.message, work.state = message, state  # type: ignore[assignment]

    def stop(self) -> None:
        """Ask the work that runs to end; what is finished is kept."""
        if self.work is not None and self.work.is_running:
            self.work.stop()

    def close(self, timeout: float = 60.0) -> None:
        """Stop the work and wait for its end."""
        self.stop()
        if self.work is not None and self.work.thread is not None:
            self.work.thread.join(timeout)
