"""Client of OpenAI-compatible endpoints: rate limits, retries, budgets, and a store so that no answer is paid for twice."""

from vlv.endpoint.budget import Budget, Ledger, Prices
from vlv.endpoint.client import Client
from vlv.endpoint.messages import Answer, ChatRequest, image_part, user, utf8
from vlv.endpoint.run import run, stream
from vlv.endpoint.secrets import split_spec, without_secrets
from vlv.endpoint.settings import Endpoint, read_changes
from vlv.endpoint.store import KeyedStore

__all__ = [
    "Answer",
    "Budget",
    "ChatRequest",
    "Client",
    "Endpoint",
    "KeyedStore",
    "Ledger",
    "Prices",
    "image_part",
    "read_changes",
    "run",
    "split_spec",
    "stream",
    "user",
    "utf8",
    "without_secrets",
]
