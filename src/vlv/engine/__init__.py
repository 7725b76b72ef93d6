"""Captions written by an engine (vLLM): this process encodes images and sends prefixes, the engine writes behind them."""

from vlv.engine.folder import saved_language_model
from vlv.engine.settings import EngineSettings
from vlv.engine.writer import EngineWriter, check_engine_writes, engine_writes

__all__ = [
    "EngineSettings",
    "EngineWriter",
    "check_engine_writes",
    "engine_writes",
    "saved_language_model",
]
