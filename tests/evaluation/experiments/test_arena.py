"""Judges of captions: the exact one, an endpoint, people; ratings, pairs in both orders, strengths, agreement."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests import tiny
from tests.endpoint.server import ScriptedServer, always, images_of, text_of
from tests.evaluation.support import judge
from vlv.cli import run as vlv
from vlv.errors import ConfigError, DataError, ModelFolderError
from vlv.evaluation.experiments import arena, rating
from vlv.evaluation.experiments.judging import score_experiment
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.rating import Ballot, RatingServer
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet
from vlv.evaluation.experiments.sources import CAPTION_KEY
from vlv.toyworld.components import make_image_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlv.evaluation.experiments.backends import Backends


@pytest.fixture
def run(tmp_path: Path, make_backends: Callable[..., Backends]) -> Run:
    """Six scenes with their captions, those of others, and those with shuffled words."""
    settings = arena.settings(["true", "other", "words"])
    run = Run.start(tmp_path / "run", arena.NAME, DataSet("test", 3, 6), settings)
    predict_captions(run, make_backends())
    return run


def lines(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.folder / f"judgements/{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(run: Run) -> dict[str, float]:
    return {f.key: f.estimate.value for f in score_experiment(run, seed=0).figures}


@pytest.mark.slow
def test_the_exact_judge_knows_the_truth(run: Run, make_backends: Callable[..., Backends]) -> None:
    assert judge(run, "exact", make_backends()).done == 18
    assert judge(run, "exact", make_backends()).done == 0
    assert judge(run, "choice=exact", make_backends(), pairs=True).done == 36
    found = figures(run)
    assert found["true.exact.rating"] == 6
    assert found["other.exact.rating"] < 2
    assert found["choice.consistent"] == 1
    assert found["true.choice.strength"] > found["words.choice.strength"]
    assert found["true.exact.strength"] > found["other.exact.strength"]


def test_every_source_is_tested_against_one_of_them(
    run: Run, make_backends: Callable[..., Backends]
) -> None:
    for name in ("exact", "linear"):
        assert judge(run, name, make_backends()).done == 18
    found = {figure.key: figure for figure in score_experiment(run, 0, against="true").figures}
    assert found["true.linear.rating"].estimate.value == 6
    compared = json.loads((run.folder / "result.json").read_text())["comparisons"]
    assert {key.split(".")[0] for key in compared} == {"other over true", "words over true"}
    paired = compared["other over true.linear.rating"]
    others = found["other.linear.rating"].estimate.value
    assert paired["difference"] == pytest.approx(others - 6)
    assert paired["high"] < 0
    assert paired["n"] == 6
    assert paired["label"] == "other: mean rating by linear (0 to 6), minus true"
    with pytest.raises(DataError, match="no figure of this run begins with ours; name a source"):
        score_experiment(run, 0, against="ours")
    with pytest.raises(ConfigError, match="linear rates single captions"):
        judge(run, "pairs=linear", make_backends(), pairs=True)


def test_a_florence_writes_captions_of_its_own(
    tmp_path: Path, make_backends: Callable[..., Backends]
) -> None:
    parts, folder = tiny.make_parts(), tmp_path / "florence"
    for part in (parts.florence, parts.florence_tokenizer, make_image_processor()):
        part.save_pretrained(folder)
    settings = arena.settings([f"rival=florence:{folder}"])
    run = Run.start(tmp_path / "run", arena.NAME, DataSet("test", 3, 3), settings)
    assert predict_captions(run, make_backends()).done == 3
    rows = run.rows("captions/rival", CAPTION_KEY)
    assert [row["finish_reason"] for row in rows] == ["length"] * 3, "random weights end nothing"
    assert all(row["caption"] and "<" not in row["caption"] for row in rows)
    (folder / "preprocessor_config.json").unlink()
    again = Run.start(tmp_path / "again", arena.NAME, DataSet("test", 3, 3), settings)
    with pytest.raises(ModelFolderError, match="no readable preprocessor_config"):
        predict_captions(again, make_backends())


@pytest.mark.slow
def test_ratings_of_an_endpoint(run: Run, make_backends: Callable[..., Backends]) -> None:
    """A judge who counts words, falters and sometimes babbles; what failed is asked again."""

    def script(body: dict[str, Any], times: int) -> str:
        caption = text_of(body).split("The description:\n")[1].split("\n")[0]
        if times == 0 and len(caption) % 3 == 0:
            return "500"
        return "say Many reasons. Rating: 9" if babble else f"say Fine.\nRating: {len(caption) % 7}"

    babble = True
    with ScriptedServer(script) as server:
        spec = f"vlm=endpoint:judge@{server.url}"
        assert judge(run, spec, make_backends()).failed == 18
        assert "no rating from 0 to 6" in lines(run, "vlm")[0]["error"]
        with pytest.raises(DataError, match=r"nothing of .* has been judged"):
            score_experiment(run, seed=0)
        babble = False
        assert judge(run, spec, make_backends()).done == 18
        assert len(images_of(server.bodies[-1])) == 1
    captions = {
        (row["id"], source): row["caption"]
        for source in ("true", "other", "words")
        for row in map(
            json.loads, (run.folder / f"captions/{source}.jsonl").read_text().splitlines()
        )
    }
    rows = lines(run, "vlm")
    assert all(row["rating"] == len(captions[row["id"], row["source"]]) % 7 for row in rows)
    assert rows[0]["model"] == "scripted/judge"
    judge(run, "exact", make_backends())
    found = figures(run)
    assert {"alpha.ordinal", "alpha.interval"} <= found.keys()
    about = json.loads((run.folder / "result.json").read_text())["settings"]
    assert about["version of vlm"] == "scripted/judge"


def test_a_judge_who_always_prefers_the_first_gives_ties(
    run: Run, make_backends: Callable[..., Backends]
) -> None:
    with ScriptedServer(always("say Hm. Verdict: A")) as server:
        judge(run, f"vlm=endpoint:judge@{server.url}", make_backends(), pairs=True)
    found = figures(run)
    assert found["vlm.consistent"] == 0
    assert [found[f"{name}.vlm.strength"] for name in ("true", "other", "words")] == pytest.approx([1, 1, 1])  # fmt: skip


def test_a_judge_of_taste(run: Run, make_backends: Callable[..., Backends]) -> None:
    """It prefers the longer text, whichever comes first."""

    def script(body: dict[str, Any], times: int) -> str:
        first, _, second = text_of(body).partition("Description A:\n")[2].partition("\n\nDescription B:\n")  # fmt: skip
        a, b = len(first), len(second.partition("\n\nWhich fits")[0])
        return f"say Verdict: {'tie' if a == b else 'A' if a > b else 'B'}"

    with ScriptedServer(script) as server:
        judge(run, f"vlm=endpoint:judge@{server.url}", make_backends(), pairs=True)
    found = figures(run)
    assert found["vlm.consistent"] == 1
    winners = {(r["first"], r["second"], r["id"]): r["winner"] for r in lines(run, "vlm")}
    assert winners["true", "words", "test-0000000"] == "tie"  # the same words


def test_answers_are_read_with_care() -> None:
    for text in ("Rating: 7", "It has 3 cubes.", ""):
        with pytest.raises(ValueError, match="no rating"):
            arena.read_rating(text)
    assert arena.read_rating("5") == {"rating": 5}
    assert arena.read_rating("Rating: 2, no: rating = 3.") == {"rating": 3}
    with pytest.raises(ValueError, match="no verdict"):
        arena.read_verdict("A picture of a cube")
    assert arena.read_verdict("**Verdict:** tie") == {"winner": "tie"}


def test_wrong_judges_are_refused(run: Run, make_backends: Callable[..., Backends]) -> None:
    with pytest.raises(ConfigError, match="is no judge of captions"):
        judge(run, "x=inspector:y", make_backends())
    with pytest.raises(ConfigError, match="shots has no effect"):
        judge(run, "exact", make_backends(), shots=4)
    with pytest.raises(ConfigError, match="a source z writes none"):
        arena.settings(["z:vlv-tiny"])


# --- people ----------------------------------------------------------------------------------------------


class Browser:
    def __init__(self, server: RatingServer) -> None:
        self.server = server

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        is_json = reply.headers.get("Content-Type") == "application/json"
        return reply.status, json.loads(content) if is_json else content.decode()


def with_page(run: Run, mode: arena.Mode, rater: str, work: Callable[[Browser], None]) -> None:
    key = arena.RATING_KEY if mode == "rating" else arena.PAIR_KEY
    with run.filling(f"judgements/{rater}", key, {"judge": "human", "mode": mode}) as table:
        server = RatingServer(Ballot(run, table, mode, rater))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            work(Browser(server))
        finally:
            server.shutdown()
            server.server_close()
            thread.join(20)


@pytest.mark.slow
def test_people_rate_blindly_and_every_vote_is_kept(run: Run) -> None:
    seen: list[int] = []

    def three(browser: Browser) -> None:
        status, page = browser.ask("GET", "/")
        assert status == 200
        assert "0: says little" in page
        for value in (6, None, 2):
            _, item = browser.ask("GET", "/next")
            assert item.keys() == {"left", "total", "mode", "item", "picture", "captions"}
            assert "true" not in json.dumps({**item, "picture": "", "captions": ""})  # no source
            seen.append(item["item"])
            assert browser.ask("POST", "/vote", {"item": item["item"], "value": value}) == (200, {"saved": True})  # fmt: skip
        assert browser.ask("GET", "/next")[1]["left"] == 15
        assert [row.get("rating") for row in lines(run, "ann")] == [6, None, 2]  # before the end

    with_page(run, "rating", "ann", three)

    def rest(browser: Browser) -> None:
        while "item" in (item := browser.ask("GET", "/next")[1]):
            seen.append(item["item"])
            browser.ask("POST", "/vote", {"item": item["item"], "value": 3})

    with_page(run, "rating", "ann", rest)
    assert seen == list(range(18))
    rows = lines(run, "ann")
    assert len({(row["id"], row["source"]) for row in rows}) == 18
    assert [row["source"] for row in rows] != sorted(row["source"] for row in rows)
    found = figures(run)
    assert {f"{name}.ann.rating" for name in ("true", "other", "words")} <= found.keys()
    notes = json.loads((run.folder / "result.json").read_text())["notes"]
    assert "ann: 1 of 18 judgements were skipped" in notes


def test_people_choose_between_two(run: Run) -> None:
    def work(browser: Browser) -> None:
        for value in ("first", "tie"):
            item = browser.ask("GET", "/next")[1]
            assert len(item["captions"]) == 2
            assert browser.ask("POST", "/vote", {"item": item["item"], "value": value})[0] == 200

    with_page(run, "pairs", "bob", work)
    assert [row["winner"] for row in lines(run, "bob")] == ["first", "tie"]


def test_the_page_listens_to_nobody_else(run: Run) -> None:
    def work(browser: Browser) -> None:
        vote = {"item": 0, "value": 6}
        assert browser.server.server_address[0] == "127.0.0.1"
        assert browser.ask("GET", "/next", Host="evil.example")[0] == 403
        assert browser.ask("POST", "/vote", vote, Origin="http://evil.example")[0] == 403
        assert browser.ask("POST", "/vote", {"item": 99, "value": 6})[0] == 400
        assert browser.ask("POST", "/vote", {"item": 0, "value": 7})[0] == 400
        assert browser.ask("POST", "/vote", {"item": 0, "value": "x" * 20_000})[0] == 400
        assert browser.ask("GET", "/elsewhere")[0] == 404
        assert lines(run, "eve") == []

    with_page(run, "rating", "eve", work)


def raw(server: RatingServer, *pieces: bytes) -> bytes:
    """What the page answers to bytes; empty where it hangs up."""
    address, answer = ("127.0.0.1", server.server_port), b""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=20) as connection:
        for piece in pieces:  # it may hang up in the middle
            connection.sendall(piece)
        while part := connection.recv(2**16):
            answer += part
    return answer


@pytest.mark.parametrize(
    "body",
    [
        '{"item": 0, "value": true}',
        '{"item": true, "value": 3}',
        '{"item": 0, "value": 3.0}',
        '{"item": 0, "value": Infinity}',
        '{"item": Infinity, "value": 3}',
        '{"item": "0", "value": 3}',
        '{"item": 0}',
        "[0, 3]",
        "7",
        "[" * 9000,
        '{"item":' * 900,
        '{"item": 0, "value": "\\ud800"}',
    ],
)
def test_a_vote_that_is_none_is_refused(
    run: Run, body: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(browser: Browser) -> None:
        head = f"POST /vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        assert raw(browser.server, head.encode(), body.encode()).startswith(b"HTTP/1.0 400")
        assert lines(run, "eve") == []

    with_page(run, "rating", "eve", work)
    assert "Traceback" not in capfd.readouterr().err


def test_every_answer_keeps_the_page_to_itself(run: Run) -> None:
    def work(browser: Browser) -> None:
        for path in ("/", "/next", "/elsewhere"):
            reply = raw(browser.server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            for header in (b"X-Frame-Options: DENY", b"X-Content-Type-Options: nosniff", b"frame-ancestors 'none'"):  # fmt: skip
                assert header in reply

    with_page(run, "rating", "eve", work)


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"x" * 10_000,
        b"POST /vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n",
    ],
)
def test_a_browser_that_drips_is_cut_off(
    run: Run, monkeypatch: pytest.MonkeyPatch, request_: bytes
) -> None:
    """A byte now and then is never silence, and would keep one of the places for ever."""
    monkeypatch.setattr(rating, "TIMEOUT", 0.3)
    monkeypatch.setattr(rating, "MAX_CONNECTIONS", 1)

    def work(browser: Browser) -> None:
        address = ("127.0.0.1", browser.server.server_port)
        began = time.monotonic()
        with socket.create_connection(address, timeout=0.05) as connection:
            connection.sendall(request_[:90])
            while not is_cut_off(connection):
                assert time.monotonic() - began < 10
        assert time.monotonic() - began > 2 * rating.TIMEOUT
        assert asked_again(browser) == 200, "the place is free a moment later"

    with_page(run, "rating", "eve", work)


def asked_again(browser: Browser) -> int:
    """The status of an answer, once there is a place."""
    for _ in range(100):
        with contextlib.suppress(http.client.RemoteDisconnected, ConnectionError):
            return browser.ask("GET", "/next")[0]
        time.sleep(0.1)
    raise AssertionError("no place became free within ten seconds")


def is_cut_off(connection: socket.socket) -> bool:
    """Send a byte, and wait a moment for the end."""
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.slow
def test_slow_and_many_connections_do_not_stop_the_page(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rating, "TIMEOUT", 0.5)
    before = threading.active_count()

    def work(browser: Browser) -> None:
        address = ("127.0.0.1", browser.server.server_port)
        slow = [socket.create_connection(address, timeout=20) for _ in range(3 * rating.MAX_CONNECTIONS)]  # fmt: skip
        for connection in slow:
            with contextlib.suppress(OSError):
                connection.sendall(
                    b"POST /vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
                )
        time.sleep(0.1)
        assert threading.active_count() <= before + 1 + 2 * rating.MAX_CONNECTIONS
        time.sleep(1.0)
        assert browser.ask("GET", "/next")[0] == 200
        for connection in slow:
            connection.close()

    with_page(run, "rating", "eve", work)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("length", ["-1", "\u00b2", "99999999999999999999", "x", ""])
def test_a_length_that_is_none_is_refused(run: Run, length: str) -> None:
    def work(browser: Browser) -> None:
        head = f"POST /vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        assert raw(browser.server, head.encode("latin-1")).startswith(b"HTTP/1.0 400")

    with_page(run, "rating", "eve", work)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    assert vlv(["eval", "predict", "arena", "--run-dir", folder, "--from", "true", "--from", "words", "--num", "3"]) == 0  # fmt: skip
    assert vlv(["eval", "judge", folder, "--judge", "exact", "--pairs"]) == 0
    assert vlv(["eval", "score", folder]) == 0
    assert "Bradley-Terry" in capsys.readouterr().out
    assert vlv(["eval", "rate", folder, "--rater", "../x"]) == 1
    assert "is no name for a rater" in capsys.readouterr().err
