"""The client against a server that misbehaves: what is repeated, what is not, what is stored, what is spent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.endpoint.server import Script, ScriptedServer, always, caption_of, faults
from tests.memory import peak_growth
from vlv.endpoint import (
    Answer,
    Budget,
    ChatRequest,
    Client,
    Endpoint,
    Prices,
    run,
    user,
)
from vlv.endpoint import KeyedStore as Store
from vlv.errors import BudgetError, ConfigError, EndpointError, OutputError, RequestError

JPEG = b"\xff\xd8\xff a picture"


def endpoint(server: ScriptedServer | str, **options: Any) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    quick = {"concurrency": 4, "timeout": 30, "backoff": 0.001, "max_backoff": 0.01}
    return Endpoint(url, "painter", **quick | options)


def question(number: int) -> ChatRequest:
    return ChatRequest([user(f"What is {number}?", JPEG)], max_tokens=50)


def ask_all(client: Client, numbers: int | range) -> dict[int, Answer | RequestError]:
    answers: dict[int, Answer | RequestError] = {}

    def keep(number: int, answer: Answer | RequestError) -> None:
        assert number not in answers
        answers[number] = answer

    numbers = range(numbers) if isinstance(numbers, int) else numbers
    run(client, ((number, question(number)) for number in numbers), keep)
    return answers


def first_then(*behaviours: str) -> Script:
    return lambda body, times: behaviours[min(times, len(behaviours) - 1)]


def expected(number: int, client: Client) -> str:
    return caption_of(json.loads(question(number).payload(client.endpoint)))


def test_every_request_gets_its_own_answer() -> None:
    with ScriptedServer(always("ok")) as server:
        client = Client(endpoint(server), prices=Prices(1.0, 10.0))
        answers = ask_all(client, 20)
        for number, answer in answers.items():
            assert isinstance(answer, Answer)
            assert answer.text == expected(number, client)
            assert (answer.finish_reason, answer.model) == ("stop", "scripted/painter")
            assert answer.usd == pytest.approx((100 * 1.0 + 20 * 10.0) / 1e6)
        assert len(answers) == server.requests == client.ledger.spent.answers == 20
        assert client.ledger.spent.usd == pytest.approx(20 * 300 / 1e6)
        assert server.most_at_once <= 4
        assert server.keys == {None}
        sent = server.bodies[0]
        assert sent["max_tokens"] == 50
        assert "temperature" not in sent
        assert sent["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;")


@pytest.mark.parametrize(
    "trouble", ["500", "503 0", "408", "429 0", "429", "malformed", "missing", "truncated", "reset"]
)
def test_passing_trouble_is_tried_again(trouble: str) -> None:
    with ScriptedServer(first_then(trouble, trouble, "ok")) as server:
        client = Client(endpoint(server))
        answers = ask_all(client, 3)
        assert [answers[n].text for n in range(3)] == [expected(n, client) for n in range(3)]  # type: ignore[union-attr]
        assert server.requests == client.ledger.spent.requests == 9


@pytest.mark.parametrize("trouble", ["bomb", "endless"])
def test_an_answer_without_end_is_not_read_on(trouble: str) -> None:
    with ScriptedServer(always(trouble)) as server, peak_growth() as growth:
        failure = ask_all(Client(endpoint(server, retries=0)), 1)[0]
    assert isinstance(failure, RequestError)
    with pytest.raises(RequestError, match="the answer is longer than 16777216 bytes"):
        raise failure
    assert growth[0] < 2**27


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("500", r"HTTP 500: scripted 500 \(3 tries\)"),
        ("malformed", r"the answer is no JSON: .*choices.* \(3 tries\)"),
        ("missing", r"the answer has no message"),
        ("truncated", r"the connection broke"),
        ("reset", r"the connection broke"),
        ("hang", r"no answer in 0\.2 s \(3 tries\)"),
    ],
)
def test_trouble_that_stays_is_named(trouble: str, words: str) -> None:
    script: Script = lambda body, times: trouble if "What is 1?" in json.dumps(body) else "ok"  # noqa: E731
    with ScriptedServer(script) as server:
        slow = 0.2 if trouble == "hang" else 30.0
        answers = ask_all(Client(endpoint(server, retries=2, timeout=slow)), 3)
        assert isinstance(answers[0], Answer)
        assert isinstance(answers[2], Answer)
        failure = answers[1]
        assert isinstance(failure, RequestError)
        assert failure.args[0]
        with pytest.raises(RequestError, match=words):
            raise failure
        assert server.requests == 2 + 3


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refused_request_is_not_repeated(status: int) -> None:
    with ScriptedServer(first_then(str(status), "ok")) as server:
        answers = ask_all(Client(endpoint(server)), 2)
        assert [str(answer) for answer in answers.values()] == [
            f"HTTP {status}: scripted {status}"
        ] * 2
        assert server.requests == 2


@pytest.mark.parametrize(("status", "words"), [(401, "accept the key"), (403, "forbids")])
def test_a_wrong_key_stops_at_once(
    status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "abc-secret")
    with ScriptedServer(always(str(status))) as server:
        with pytest.raises(EndpointError, match=words) as caught:
            ask_all(Client(endpoint(server, key_env="SOME_KEY")), 1000)
        assert server.requests <= 4
        assert server.keys == {"Bearer abc-secret"}
        assert "secret" not in str(caught.value)


def test_the_key_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "scripted")  # which the server's error repeats
    with ScriptedServer(always("400")) as server:
        client = Client(endpoint(server, key_env="SOME_KEY"))
        assert str(ask_all(client, 1)[0]) == "HTTP 400: *** 400"
        assert "scripted" not in repr(client.endpoint)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match="SOME_KEY, which should hold the key, is not set"):
        Client(endpoint("http://127.0.0.1:1/v1", key_env="SOME_KEY"))


def test_no_redirect_is_followed() -> None:
    with (
        ScriptedServer(always("ok")) as other,
        ScriptedServer(always(f"307 {other.url}")) as server,
    ):
        with pytest.raises(EndpointError, match=f"redirects to {other.url}, which is not followed"):
            ask_all(Client(endpoint(server)), 3)
        assert other.requests == 0


def test_nobody_there() -> None:
    with ScriptedServer(always("ok")) as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"no connection to .*is the server running"):
        ask_all(Client(endpoint(url, retries=2)), 10)


def test_an_endpoint_that_only_fails_is_given_up() -> None:
    with ScriptedServer(always("500")) as server:
        client = Client(endpoint(server, retries=0, failures_in_a_row=5, concurrency=1))
        with pytest.raises(EndpointError, match=r"5 requests in a row have failed.*scripted 500"):
            ask_all(client, 100)
        assert server.requests == 5


def test_retry_after_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    import vlv.endpoint.client as module

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    pauses: list[float] = []
    monkeypatch.setattr(module.Pause, "extend", lambda self, seconds: pauses.append(seconds))
    with ScriptedServer(first_then("429 7", "503 date", "ok")) as server:
        ask_all(Client(endpoint(server)), 1)
    assert pauses[0] == 7.0
    assert 0 <= pauses[1] <= 1  # a date, a second ahead
    assert 7.0 in slept


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "wait", ["99999999999999999999", "901", "1e300", "Fri, 31 Dec 9999 23:59:59 GMT"]
)
def test_a_wait_beyond_the_patience_is_no_wait(status: int, wait: str) -> None:
    with ScriptedServer(always(f"{status} {wait}")) as server:
        answer = ask_all(Client(endpoint(server)), 1)[0]
        assert "more than the patience of 900 s" in str(answer)
        assert server.requests == 1


def test_rate_limiting_does_not_use_up_the_tries() -> None:
    with ScriptedServer(first_then(*["429 0"] * 9, "ok")) as server:
        assert isinstance(ask_all(Client(endpoint(server, retries=1)), 1)[0], Answer)
    with ScriptedServer(always("429 0")) as server:
        answer = ask_all(Client(endpoint(server, retries=1, patience=0.05)), 1)[0]
        assert "rate limited for 0.05 s: HTTP 429" in str(answer)


def test_no_answer_is_paid_for_twice(tmp_path: Path) -> None:
    with ScriptedServer(always("ok")) as server:
        with Store(tmp_path / "answers.sqlite") as store:
            client = Client(endpoint(server), store=store)
            doubled = [(n, question(n % 5)) for n in range(20)]
            run(client, doubled, lambda tag, answer: None)
            assert server.requests == len(store) == 5
            assert (client.ledger.spent.answers, client.ledger.spent.cached) == (5, 15)
        with Store(tmp_path / "answers.sqlite") as store:
            client = Client(endpoint(server), store=store)
            answers = ask_all(client, 5)
            assert server.requests == 5
            assert answers[3].text == expected(3, client)  # type: ignore[union-attr]
            assert client.ledger.before.tokens == 5 * 120


def test_failures_are_not_stored(tmp_path: Path) -> None:
    script = first_then("400", "ok")
    with ScriptedServer(script) as server, Store(tmp_path / "answers.sqlite") as store:
        assert isinstance(ask_all(Client(endpoint(server), store=store), 1)[0], RequestError)
        assert isinstance(ask_all(Client(endpoint(server), store=store), 1)[0], Answer)


@pytest.mark.parametrize(
    ("budget", "answers"),
    [
        (Budget(requests=10), 10),
        (Budget(tokens=1200), 9),  # a tenth might come to 100 + 50 tokens
        (Budget(usd=0.0012), 9),
    ],
)
def test_a_budget_stops_cleanly_and_counts_earlier_runs(
    tmp_path: Path, budget: Budget, answers: int
) -> None:
    with ScriptedServer(always("ok")) as server:
        done: list[int] = []
        for _ in range(2):
            with Store(tmp_path / "answers.sqlite") as store:
                client = Client(
                    endpoint(server), store=store, budget=budget, prices=Prices(1.0, 1.0)
                )
                with pytest.raises(BudgetError, match="is used up"):
                    run(client, ((n, question(n)) for n in range(50)), lambda n, a: done.append(n))
                assert len(store) == sum(server.delivered.values()) == answers
                assert client.ledger.before.tokens + client.ledger.spent.tokens == answers * 120
        assert len(set(done)) == answers


def test_a_budget_in_usd_wants_prices() -> None:
    with pytest.raises(ConfigError, match="without prices"):
        Client(endpoint("http://127.0.0.1:1/v1"), budget=Budget(usd=1.0))


def test_requests_are_taken_when_their_turn_comes() -> None:
    taken: list[int] = []

    def endless() -> Iterator[tuple[int, ChatRequest]]:
        for number in count():
            assert threading.current_thread() is not threading.main_thread()
            taken.append(number)
            yield number, question(number)

    with ScriptedServer(always("ok")) as server:
        client = Client(endpoint(server), budget=Budget(requests=30))
        with pytest.raises(BudgetError):
            run(client, endless(), lambda number, answer: None)
    assert 30 <= len(taken) <= 30 + 2 * 4


def test_interrupted_in_the_middle(tmp_path: Path) -> None:
    def interrupt(number: int, answer: object) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with ScriptedServer(always("ok")) as server, Store(tmp_path / "answers.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            run(Client(endpoint(server), store=store), _many(100), interrupt)
        assert 5 <= len(store) < 100
        ask_all(Client(endpoint(server), store=store), 100)
        assert server.requests <= 100 + 4
        assert len(store) == 100


def _many(number: int) -> Iterator[tuple[int, ChatRequest]]:
    return ((n, question(n)) for n in range(number))


def test_faults_of_all_kinds_at_once(tmp_path: Path) -> None:
    shares = {"500": 0.1, "hang": 0.02, "malformed": 0.05, "truncated": 0.03, "reset": 0.03}
    shares |= {"429 0": 0.05, "slow": 0.05}
    with ScriptedServer(faults(shares), slow=0.01) as server, Store(tmp_path / "a") as store:
        client = Client(endpoint(server, timeout=0.5, concurrency=16), store=store)
        answers = ask_all(client, 300)
        assert [answers[n].text for n in range(300)] == [expected(n, client) for n in range(300)]  # type: ignore[union-attr]
        assert set(server.delivered.values()) == {1}
        assert server.requests == client.ledger.spent.requests > 300


def test_a_full_disk_stops_with_a_sentence(tmp_path: Path) -> None:
    with ScriptedServer(always("ok")) as server, Store(tmp_path / "answers.sqlite") as store:
        store._base.execute("PRAGMA max_page_count = 4")
        with pytest.raises(OutputError, match=r"answers.sqlite cannot be written: .*full"):
            ask_all(Client(endpoint(server), store=store), 500)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    words = "another process works with"
    with Store(tmp_path / "answers.sqlite"), pytest.raises(OutputError, match=words):
        Store(tmp_path / "answers.sqlite")
    (tmp_path / "no-store").write_text("something else entirely, and long enough for a header" * 9)
    with pytest.raises(OutputError, match="damaged, or no file of vlv"):
        Store(tmp_path / "no-store")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_url": "example.org/v1"}, "is no address"),
        ({"base_url": "ftp://example.org"}, "is no address"),
        ({"base_url": "http://me:word@example.org/v1"}, "user name or password"),
        ({"base_url": "http://example.org/v1?key=3"}, "must end before"),
        ({"model": ""}, "no model"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"requests_per_minute": -1}, "requests_per_minute is -1"),
        ({"retries": -1}, "retries is -1"),
        ({"concurrency": 10**9}, "concurrency is 1000000000"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"patience": float("inf")}, "patience is inf"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute is nan"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "is no address"),
        ({"base_url": "http://[::1/v1"}, "is no address"),
        ({"base_url": "http://a\nb/v1"}, "is no address"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Endpoint(**{"base_url": "http://127.0.0.1/v1", "model": "m"} | change)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_prices_and_budgets_are_numbers(number: float) -> None:
    for make in (lambda: Prices(number), lambda: Prices(0.0, number), lambda: Budget(usd=number)):
        with pytest.raises(ConfigError):
            make()


def test_a_client_may_be_used_again() -> None:
    with ScriptedServer(always("slow"), slow=0.01) as server:
        client = Client(endpoint(server, concurrency=2), budget=Budget(requests=30))
        for _ in range(3):
            assert len(ask_all(client, 9)) == 9
        assert client.ledger.spent.requests == server.requests == 27


def test_waits_grow_while_the_server_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    import vlv.endpoint.client as module

    longest: list[float] = []

    def backoff(attempt: int, base: float, most: float, random: object) -> float:
        longest.append(min(most, base * 2**attempt))
        return 0.0

    monkeypatch.setattr(module, "backoff", backoff)
    with ScriptedServer(first_then(*["429"] * 4, "500", "ok")) as server:
        ask_all(Client(endpoint(server, backoff=1, max_backoff=6)), 1)
    assert longest == [1, 2, 4, 6, 6]


def test_the_request_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import vlv.endpoint.pace as module

    waited: list[float] = []
    real: Callable[..., Any] = module.asyncio.sleep

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await real(0)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    with ScriptedServer(always("ok")) as server:
        ask_all(Client(endpoint(server, requests_per_minute=60, concurrency=1)), 4)
    assert max(waited) > 2  # the fourth is due three seconds after the first
