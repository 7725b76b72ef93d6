"""`vlv ask`, and captions in several styles."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Vlv
from tests.instructed import PLAIN

ASKED = "is it a cube?"


def test_one_image_one_question(vlv: Vlv, photos: Path, instructed_folder: Path) -> None:
    result = vlv("ask", photos / "0.png", ASKED, "--model", instructed_folder)
    assert result.code == 0
    answer, share = result.out.rstrip("\n").split("\t")
    assert answer == "yes"
    assert float(share) > 0.9


def test_many_of_each(vlv: Vlv, photos: Path, instructed_folder: Path, tmp_path: Path) -> None:
    args = ("ask", photos, ASKED, "how many objects are there?", "--model", instructed_folder)
    result = vlv(*args)
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert len(lines) == 10
    assert [line[:3] for line in lines[:2]] == [
        [str(photos / "0.png"), ASKED, "yes"],
        [str(photos / "0.png"), "how many objects are there?", "two"],
    ]
    output = tmp_path / "answers.csv"
    assert vlv(*args, "-o", output).code == 0
    with output.open(newline="") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == ["yes", "two"] * 5
    assert "done 0, skipped 10" in vlv(*args, "-o", output).err
    printed = vlv(*args, "-o", "-").out.splitlines()
    assert json.loads(printed[0])["answer"] == "yes"


def test_missing_images_of_a_table_are_named(
    vlv: Vlv, photos: Path, instructed_folder: Path
) -> None:
    table = photos / "q.csv"
    table.write_text(f"image,question\n0.png,{ASKED}\ngone.png,{ASKED}\n")
    result = vlv("ask", table, "--model", instructed_folder)
    assert result.code == 2
    assert result.out.split("\t")[1] == "yes"
    (failed,) = [line for line in result.err.splitlines() if line.startswith("failed: ")]
    assert "gone.png" in failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IMAGE"], "no question was asked"),
        (["IMAGE", " "], "a question is empty"),
        (["IMAGE", "why?", "--question-column", "q"], "has no effect"),
        (["IMAGE", "why?", "-o", "a.txt"], "must end in"),
        (["gone.jsonl"], "there is no such file"),
    ],
)
def test_wrong_usage(
    vlv: Vlv, photos: Path, instructed_folder: Path, arguments: list[str], message: str
) -> None:
    given = [str(photos / "0.png") if word == "IMAGE" else word for word in arguments]
    result = vlv("ask", *given, "--model", instructed_folder)
    assert result.code == 1
    assert message in result.err


def test_a_model_without_answers_leaves_nothing_behind(
    vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    result = vlv("ask", photos, ASKED, "--model", tiny_folder, "-o", output)
    assert result.code == 1
    assert "was not taught to answer questions" in result.err
    assert not list(tmp_path.glob("answers*"))


# --- styles ---------------------------------------------------------------------------------------


def test_a_style_and_several(
    vlv: Vlv, photos: Path, instructed_folder: Path, tmp_path: Path
) -> None:
    args = ("caption", photos / "0.png", "--model", instructed_folder)
    assert vlv(*args, "--style", "short").out == "A cube.\n"
    assert vlv(*args, "--prompt", "Short:").out == "A cube.\n"
    assert vlv(*args, "--style", "short", "--words", 3).out == "A red cube.\n"
    assert vlv(*args, "--style", "short", "--style", "tags").out == (
        "short\tA cube.\ntags\tlarge, red\n"
    )
    output = tmp_path / "out.csv"
    vlv(*args, "--style", "tags", "--style", "short", "-o", output, "--prefix", "<")
    with output.open(newline="") as file:
        (row,) = csv.DictReader(file)
    names = ("caption", "caption_tags", "caption_short")
    assert [row[name] for name in names] == ["<large, red", "<large, red", "<A cube."]
    other = vlv(*args, "-o", output)
    assert other.code == 1
    assert "styles" in other.err


def test_an_image_is_encoded_once_for_all_styles(
    vlv: Vlv, photos: Path, instructed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlv.models.encoder import VLVEncoder

    calls: list[int] = []
    forward = VLVEncoder.forward

    def counted(self: VLVEncoder, pixels: object, *rest: object) -> object:
        calls.append(1)
        return forward(self, pixels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(VLVEncoder, "forward", counted)
    args = ("caption", photos / "0.png", "--model", instructed_folder)
    assert vlv(*args, "--style", "short", "--style", "tags").code == 0
    assert len(calls) == 1


def test_known_facts_come_from_a_column(
    vlv: Vlv, photos: Path, instructed_folder: Path, tmp_path: Path
) -> None:
    table, output = photos / "list.jsonl", tmp_path / "out.jsonl"
    facts = [["5 m wide"], None, {"a": 1}, "5 m wide."]
    rows = [{"file_name": f"{n}.png", "fact": fact} for n, fact in enumerate(facts)]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    args = ("caption", table, "--model", instructed_folder, "-o", output, "--context-column")
    assert vlv(*args, "fact").code == 2
    found = [json.loads(line) for line in output.read_text().splitlines()]
    told = "A cube, 5 m wide."
    assert [row["caption"] for row in found] == [told, PLAIN, None, told]
    assert "neither a text nor a list" in found[2]["error"]
    assert "context_column" in vlv(*args[:-1]).err, "another run is refused"
    other = vlv(*args, "fatc", "--on-existing", "append")
    assert other.code == 1
    assert "no image has a field 'fatc'; did you mean fact?" in other.err
    table.unlink()
    (photos / "0.txt").write_text("5 m wide")
    beside = vlv("caption", photos / "0.png", *args[2:4], "--context-column", "caption")
    assert beside.out == f"{told}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--style", "shrot"], "knows no style 'shrot'; did you mean short?"),
        (["--style", "short", "--style", "short"], "named twice"),
        (["--style", "short", "--prompt", "x"], "leave one out"),
        (["--prompt", ""], "--prompt is empty"),
        (["--words", 0], "--words is 0; choose between 1 and 1000"),
        (["--words", 10_000], "--words is 10000"),
        (["--words", 3, "--verify", 2], "plain captions are verified"),
        (["--style", "short", "--verify", 2], "plain captions are verified"),
    ],
)
def test_styles_that_make_no_sense(
    vlv: Vlv,
    photos: Path,
    instructed_folder: Path,
    tmp_path: Path,
    options: list[object],
    message: str,
) -> None:
    output = tmp_path / "out.jsonl"
    result = vlv("caption", photos, "--model", instructed_folder, "-o", output, *options)
    assert result.code == 1
    assert message in result.err
    assert not list(tmp_path.glob("out*"))


def test_a_model_without_styles_says_so(vlv: Vlv, photos: Path, tiny_folder: Path) -> None:
    result = vlv("caption", photos, "--model", tiny_folder, "--style", "short")
    assert result.code == 1
    assert "knows no styles" in result.err
    result = vlv("caption", photos, "--model", tiny_folder, "--words", 9)
    assert result.code == 1
    assert "was not taught to write so many words" in result.err


def test_info_lists_them(vlv: Vlv, instructed_folder: Path, tiny_folder: Path) -> None:
    about = vlv("info", instructed_folder).out
    assert "styles:  short, tags" in about
    assert "answers: questions" in about
    assert "lengths: as many words" in about
    assert "uses:    what is known" in about
    plain = vlv("info", tiny_folder).out
    assert "styles:" not in plain
    assert "answers:" not in plain
    assert "lengths:" not in plain
    assert PLAIN not in plain
