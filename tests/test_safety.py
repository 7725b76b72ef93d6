"""No code out of a model folder: every loader that could run it is told not to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "src" / "vlv"

# Classes of a fixed implementation, which never look for code beside the weights.
FIXED = {
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "CaptionDecoderConfig",
    "Florence2ForConditionalGeneration",
    "Inspector",
    "MODELS[part]",
    "VLVEncoderConfig",
    "VLVPipeline",
    "scheduler_class(config)",
}


def remote_code(source: str) -> list[str]:
    """Calls of a loader that do not say ``trust_remote_code=False``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            allowed = not (isinstance(node.value, ast.Constant) and node.value.value is False)
            found += [f"line {node.value.lineno}: trust_remote_code"] * allowed
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        method = node.func.attr
        if method not in {"from_pretrained", "from_config"}:
            continue
        owner = ast.unparse(node.func.value)
        loads = method == "from_pretrained" and owner not in FIXED and owner != "super()"
        builds = method == "from_config" and owner.startswith("Auto")
        if (loads or builds) and "trust_remote_code" not in {
            keyword.arg for keyword in node.keywords
        }:
            found.append(f"line {node.lineno}: {owner}.{method}")
    return found


def test_the_lint_finds_what_it_is_for() -> None:
    assert remote_code("AutoTokenizer.from_pretrained(x)") == [
        "line 1: AutoTokenizer.from_pretrained"
    ]
    assert remote_code("a.from_pretrained(x, trust_remote_code=True)") == [
        "line 1: trust_remote_code"
    ]
    assert remote_code("AutoModel.from_config(x)") == ["line 1: AutoModel.from_config"]
    assert not remote_code("AutoModel.from_config(x, trust_remote_code=False)")


def test_nothing_runs_code_from_a_model_folder() -> None:
    found = {path: remote_code(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert found
    assert not {path: lines for path, lines in found.items() if lines}


# The official conversion reads the authors' pickles, and says so; published instruments of evaluation may be pickles too,
# which transformers opens with ``weights_only``; the toy world trains on what it has just written.
MAY_BE_PICKLES = {"official_parts.py", "official.py", "features.py", "pretrain.py", "ship.py"}
NO_WEIGHTS = (
    "Tokenizer",
    "Processor",
    "Config",
    "scheduler_class(config)",
    "VLVPipeline",
    "super()",
    "cls",
)


def pickles(source: str) -> list[str]:
    """Calls that load weights and do not say ``use_safetensors=True``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "from_pretrained":
            continue
        owner, keywords = ast.unparse(node.func.value), ast.unparse(node)
        if owner.endswith(NO_WEIGHTS):
            continue
        named = "use_safetensors=True" in keywords
        passed_on = "**options" in keywords and '"use_safetensors": True' in source
        if not (named or passed_on):
            found.append(f"line {node.lineno}: {owner}.from_pretrained")
    return found


def test_weights_are_safetensors() -> None:
    assert pickles("AutoModel.from_pretrained(x)") == ["line 1: AutoModel.from_pretrained"]
    assert not pickles("AutoModel.from_pretrained(x, use_safetensors=True)")
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in MAY_BE_PICKLES]
    found = {path.name: pickles(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: lines for name, lines in found.items() if lines}


def test_the_list_of_attacks_names_tests_that_there_are() -> None:
    rows = [line for line in (TESTS / "README.md").read_text("utf-8").splitlines() if "::" in line]
    assert len(rows) > 35
    for row in rows:
        for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", row):
            assert f"def {name}(" in (TESTS / file).read_text("utf-8"), f"{file}::{name}"
        assert row.count("::") == len(re.findall(r"`[\w/]+\.py::\w+`", row)), row
