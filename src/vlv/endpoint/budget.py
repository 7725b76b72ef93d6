"""Prices, budgets, and the ledger of what was spent."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from vlv.endpoint.messages import Answer


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens; 0 for a model of your own."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Cost in US dollars.

        >>> Prices(0.1, 0.4).cost(1_000_000, 500_000)
        0.3
        """
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def __post_init__(self) -> None:
        for price in (self.prompt, self.completion):
            if not 0 <= price < math.inf:
                raise ConfigError(f"the price of {price} is none; give a finite number, 0 or more")


@dataclass(frozen=True)
class Budget:
    """What may be spent at most, over all runs that share a store; None sets no limit.

    Attributes:
        requests: Requests sent, failed ones included (of earlier runs only the answered ones are known).
        tokens: Tokens of prompts and answers.
        usd: US dollars, by the prices given.
    """

    requests: int | None = None
    tokens: int | None = None
    usd: float | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "usd"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"the budget of {value} {name} is no budget; leave it out for none"
                )


@dataclass
class Spent:
    """Counts of requests and what they cost."""

    requests: int = 0
    answers: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, eq=False)
class Ticket:
    """What one request in flight may come to; each is itself, however equal."""

    tokens: int
    usd: float


class Ledger:
    """Counts what is spent, and refuses what would go beyond the budget.

    A request is entered with the most that it may come to before it is sent, so that those in flight
    together cannot break the budget either (beyond a wrong guess of a prompt's size).

    Args:
        budget: What may be spent.
        prices: Of the model.
        before: What earlier runs have spent.

    Attributes:
        spent: What this run has spent.
        before: What earlier runs have spent.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        prices: Prices | None = None,
        before: Spent | None = None,
    ) -> None:
        self.budget, self.prices = budget or Budget(), prices or Prices()
        if self.budget.usd is not None and not (self.prices.prompt or self.prices.completion):
            raise ConfigError("a budget in USD has no effect without prices; give those as well")
        self.spent, self.before = Spent(), before or Spent()
        self._open: set[Ticket] = set()
        self._changed = asyncio.Event()

    def reopen(self) -> None:
        """Begin anew in another event loop; what was spent stays."""
        self._open.clear()
        self._changed = asyncio.Event()

    def expected_prompt_tokens(self, guess: int) -> int:
        """Size of the next prompt: the mean of those so far, or else the guess."""
        answers = self.before.answers + self.spent.answers
        tokens = self.before.prompt_tokens + self.spent.prompt_tokens
        return round(tokens / answers) if answers else guess

    async def enter(self, guessed_prompt_tokens: int, completion_tokens: int) -> Ticket:
        """Enter a request that is about to be sent; waits while others in flight may use up the rest.

        Raises:
            BudgetError: It would go beyond the budget.
        """
        while over := self._over(ticket := self._ticket(guessed_prompt_tokens, completion_tokens)):
            if not self._open:
                raise BudgetError(over)
            self._changed.clear()
            await self._changed.wait()
        self.spent.requests += 1
        self._open.add(ticket)
        return ticket

    def _ticket(self, guessed_prompt_tokens: int, completion_tokens: int) -> Ticket:
        prompt = self.expected_prompt_tokens(guessed_prompt_tokens)
        return Ticket(prompt + completion_tokens, self.prices.cost(prompt, completion_tokens))

    def leave(self, ticket: Ticket, answer: Answer | None) -> None:
        """A request has ended, with an answer or without."""
        self._open.discard(ticket)
        self._changed.set()
        if answer is not None:
            self.spent.answers += 1
            self.spent.prompt_tokens += answer.prompt_tokens
            self.spent.completion_tokens += answer.completion_tokens
            self.spent.usd += answer.usd

    def _over(self, ticket: Ticket) -> str | None:
        """Which part of the budget the request would break, in words."""
        limits = self.budget
        requests = self.before.requests + self.spent.requests
        if limits.requests is not None and requests + 1 > limits.requests:
            return f"the budget of {limits.requests} requests is used up ({requests} were sent)"
        tokens = self.before.tokens + self.spent.tokens
        pending = sum(one.tokens for one in self._open) + ticket.tokens
        if limits.tokens is not None and tokens + pending > limits.tokens:
            return f"the budget of {limits.tokens} tokens is used up ({tokens} were spent)"
        usd = self.before.usd + self.spent.usd
        pending_usd = sum(one.usd for one in self._open) + ticket.usd
        if limits.usd is not None and usd + pending_usd > limits.usd + 1e-12:
            return f"the budget of {limits.usd:g} USD is used up ({usd:.4f} USD were spent)"
        return None
