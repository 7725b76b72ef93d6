"""Which modules pytest imports for their doctests: those of an extra only where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = (
    [] if find_spec("gradio") else [f"src/vlv/ui/{name}.py" for name in ("*_tab", "*_panel", "app")]
)
