"""The tour: what it shows is what the model does, and the committed pages are those that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from tools.figures import BEGIN, END, with_figures
from tools.figures import main as write_figures
from tools.settings_page import _sections_of, settings_page
from tools.settings_page import main as write_settings
from tools.tour import pictures, trace
from tools.tour.__main__ import main as tour
from tools.tour.page import TourSettings, tensor_table, write_tour
from vlv.config import Stage1Run, Stage2Run
from vlv.curation.settings import EmbeddingRule, FilterConfig, ScoreRule
from vlv.models.folder import find_folder, shipped_models
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene

DOCS = Path(__file__).parents[2] / "docs"
TRUTH = "A photo of a red cube."
SHIPPED = "vlv-tiny"

needs_weights = pytest.mark.skipif(
    SHIPPED not in shipped_models(), reason=f"{SHIPPED} is not part of this checkout"
)


class Traces(NamedTuple):
    image: Image.Image
    encoding: trace.Encoding
    words: trace.Captioning
    drawing: trace.Drawing


@pytest.fixture(scope="module")
def traces(tiny_pipeline: VLVPipeline) -> Traces:
    image = Image.fromarray(render(sample_scene(0, 2, "test")).image)
    encoding = trace.encode(tiny_pipeline, image)
    words = trace.caption(tiny_pipeline, encoding.c, TRUTH, max_new_tokens=6)
    drawing = trace.draw(tiny_pipeline, encoding, TRUTH, seed=3, steps=4, guidance=2.0)
    return Traces(image, encoding, words, drawing)


@pytest.fixture(scope="module")
def docs(tiny_pipeline: VLVPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_tour(tiny_pipeline, folder, TourSettings("a-model", steps=4, max_new_tokens=6))
    return folder


def links(page: Path) -> list[str]:
    """Relative links and pictures of a Markdown page, without anchors."""
    found = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    return [link.split("#")[0] for link in found if "://" not in link and not link.startswith("#")]


def skeleton(text: str) -> tuple[list[str], list[float]]:
    """The page without its measured numbers and the model's words, and the numbers."""
    lines = [line for line in text.splitlines() if not line.startswith((">", "`"))]
    number = re.compile(r"-?\d+\.\d{3}\b")
    return [number.sub("#", line) for line in lines], [
        float(x) for x in number.findall("\n".join(lines))
    ]


# --- the trace -------------------------------------------------------------------------------------


def test_encoding_is_what_the_pipeline_does(traces: Traces, tiny_pipeline: VLVPipeline) -> None:
    encoding = traces.encoding
    z = tiny_pipeline.embed(traces.image)
    torch.testing.assert_close(encoding.z[0], z)
    torch.testing.assert_close(encoding.c.sequence, tiny_pipeline.context(z).sequence)
    assert encoding.vision.shape == (1, 32, 4, 4)
    assert encoding.features.shape == (1, 17, 32)
    torch.testing.assert_close(encoding.inputs[:, :17], encoding.features)
    assert encoding.memory.shape == encoding.inputs.shape
    torch.testing.assert_close(encoding.queries, tiny_pipeline.encoder.queries)
    torch.testing.assert_close(tiny_pipeline.encoder.projector(encoding.hidden), encoding.z)


def test_words_are_what_the_pipeline_says(traces: Traces, tiny_pipeline: VLVPipeline) -> None:
    words = traces.words
    assert words.caption.text == tiny_pipeline.caption(traces.image, max_new_tokens=6)
    assert words.e.shape == (1, 8, 48)
    assert len(words.pieces) == words.ids.shape[1]
    reader = tiny_pipeline.caption_decoder
    assert words.true_loss == pytest.approx(reader.loss(traces.encoding.c.sequence, [TRUTH]).item())


def test_drawing_is_what_the_pipeline_draws(traces: Traces, tiny_pipeline: VLVPipeline) -> None:
    drawing = traces.drawing
    expected = tiny_pipeline.reconstruct(traces.image, seed=3, steps=4, guidance=2.0)
    assert drawing.image.tobytes() == expected.tobytes()
    assert drawing.moments[-1].picture.tobytes() == expected.tobytes()
    first = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawing.moments[0].latents[0], first)
    timesteps = [moment.timestep for moment in drawing.moments]
    assert timesteps == sorted(timesteps, reverse=True)
    assert len(timesteps) == 5
    unet = tiny_pipeline.unet
    with torch.no_grad():
        said = unet(
            first[None], timesteps[0], encoder_hidden_states=traces.encoding.c.sequence
        ).sample
    torch.testing.assert_close(drawing.prediction, said)


def test_losses_are_those_of_the_decoder(traces: Traces, tiny_pipeline: VLVPipeline) -> None:
    assert list(traces.drawing.losses) == ["no text", "z", "the true caption"]
    decoder, latents = tiny_pipeline.decoder, traces.drawing.latents
    loss = trace.denoising_loss(decoder, latents, decoder.null_context(), seed=3)
    assert traces.drawing.losses["no text"] == pytest.approx(loss)


def test_without_guidance_the_steps_are_the_same(
    traces: Traces, tiny_pipeline: VLVPipeline
) -> None:
    drawing = trace.draw(tiny_pipeline, traces.encoding, TRUTH, seed=3, steps=4, guidance=1.0)
    assert [m.timestep for m in drawing.moments] == [m.timestep for m in traces.drawing.moments]
    torch.testing.assert_close(drawing.prediction, traces.drawing.prediction)


def test_nothing_stays_on_the_model(traces: Traces, tiny_pipeline: VLVPipeline) -> None:
    for part in (tiny_pipeline.encoder, tiny_pipeline.unet):
        assert not any(module._forward_hooks for module in part.modules())


# --- the pictures ----------------------------------------------------------------------------------


def test_heat_map() -> None:
    matrix = torch.tensor([[0.0, 5.0, -5.0]])
    colours = np.asarray(pictures.heat_map(matrix, scale=2))
    assert colours.shape == (2, 6, 3)
    assert (colours[:, :2] == 255).all()
    assert colours[0, 2, 0] > colours[0, 2, 2], "above zero is red"
    assert colours[0, 4, 0] < colours[0, 4, 2], "below zero is blue"
    assert (np.asarray(pictures.heat_map(torch.zeros(2, 2))) == 255).all()


def test_maps_and_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(17, 8, generator=generator)
    assert pictures.token_map(tokens, 64).size == (64, 64)
    assert pictures.token_map(tokens[:12], 64).size == (55, 5), "no square: one row"
    assert pictures.latent_map(torch.randn(4, 8, 8, generator=generator), 64).size == (64, 64)
    small = Image.new("RGB", (8, 8))
    assert pictures.enlarge(small, 64).size == (64, 64)
    assert pictures.enlarge(Image.new("RGB", (512, 512)), 64).size == (512, 512)
    assert pictures.grid([[small, small], [small]]).size == (20, 20)


# --- the page --------------------------------------------------------------------------------------


def test_page(docs: Path) -> None:
    text = (docs / "tour.md").read_text(encoding="utf-8")
    assert "$" not in text
    assert len(re.findall(r"^## \d\. ", text, re.MULTILINE)) == 9
    assert "| **z** | caption embedding | (1, 8, 32) | float32 |" in text
    assert "| x_T | pure noise | (1, 4, 8, 8) | float32 |" in text
    shown = [link for link in links(docs / "tour.md") if link.endswith(".png")]
    assert sorted(docs / link for link in shown) == sorted((docs / "images/tour").iterdir())


def test_tensor_table() -> None:
    table = tensor_table(("a", "b", torch.tensor([-1e-9, 1e-9])), ("ids", "c", torch.tensor([1])))
    assert table.splitlines()[2:] == [
        "| a | b | (2,) | float32 | 0.000 | 0.000 |",
        "| ids | c | (1,) | int64 |  |  |",
    ]


@pytest.mark.slow
def test_the_command_writes_the_page(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tour(["--model", str(tiny_folder), "--steps", "2", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tour.md'}\n"
    assert f"the model `{tiny_folder}`" in (tmp_path / "tour.md").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_weights
def test_the_committed_tour_is_up_to_date(tmp_path: Path) -> None:
    """Shapes and words are equal; numbers may differ as they do between processors."""
    pipe = VLVPipeline.from_pretrained(SHIPPED)
    now = write_tour(pipe, tmp_path, TourSettings(SHIPPED)).read_text(encoding="utf-8")
    lines, numbers = skeleton(now)
    old_lines, old_numbers = skeleton((DOCS / "tour.md").read_text(encoding="utf-8"))
    assert lines == old_lines, "run `make pages`"
    assert numbers == pytest.approx(old_numbers, rel=0.02, abs=0.01), "run `make pages`"
    for picture in (tmp_path / "images/tour").iterdir():
        assert (DOCS / "images/tour" / picture.name).is_file()


# --- the other pages -------------------------------------------------------------------------------


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        assert field.description, f"{prefix}{name} has no docstring"
        found.append(prefix + name)
    return found


def test_every_setting_is_in_the_table() -> None:
    page = settings_page()
    for section in ("model", "data", "optim", "loop", "stage1", "stage2"):
        field = (Stage1Run.model_fields | Stage2Run.model_fields)[section]
        kinds = list(_sections_of(field.annotation))
        assert kinds
        for kind in kinds:
            assert all(f"| `{key}` |" in page for key in keys(kind, f"{section}."))
    for kind in (FilterConfig, ScoreRule, EmbeddingRule):
        assert all(f"| `{key}` |" in page for key in keys(kind))
    assert "| `watermark` | settings, see below or null | null |" in page
    assert "| `optim.betas` | list of number | `[0.9, 0.99]` |" in page
    assert "| `loop.seed` | integer | `0` |" in page
    assert (
        "| `loop.trackers` | list of `tensorboard` or `wandb` or `trackio` or null | null |" in page
    )
    assert "| `optim.clip` | number or null | `1.0` |" in page


def test_the_committed_settings_are_up_to_date() -> None:
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == settings_page(), "run `make pages`"


@needs_weights
def test_the_readmes_figures_are_those_of_the_shipped_evaluation() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    evaluation = json.loads((find_folder(SHIPPED) / "evaluation.json").read_text(encoding="utf-8"))
    assert with_figures(readme, evaluation) == readme, "run `make pages`"


def test_the_figures_of_verified_captions_are_those_of_their_file() -> None:
    page = (DOCS / "verification.md").read_text(encoding="utf-8")
    evaluation = json.loads((DOCS / "results" / "best-of.json").read_text(encoding="utf-8"))
    assert with_figures(page, evaluation) == page, "run `make pages`"


def test_a_table_of_what_choosing_gains() -> None:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "unit": "share"}
    ratio = figure | {"unit": "ratio", "verdict": "below floor"}
    nothing = {"value": None, "low": None, "high": None, "unit": "ratio"}
    figures = {
        "best_of.greedy.f1": figure,
        "best_of.greedy.hallucinated": figure,
        "best_of.denoising.8.f1": figure,
        "best_of.denoising.8.hallucinated": figure,
        "best_of.denoising.8.hallucinated_ratio": ratio,
        "best_of.denoising.8.of_oracle": nothing,
    }
    settings = {"num": 9, "split": "test", "seed": 4, "temperature": 0.7, "timesteps": 3}
    sections = {"best_of": {"figures": figures}}
    page = with_figures(f"{BEGIN}\n{END}", {"settings": settings, "sections": sections})
    assert "9 scenes of split test, seed 4" in page
    assert "| greedy | 1 | 50 % (40 to 60) | 50 % (40 to 60) | 1 | 0 |" in page
    row = "| 8 | 50 % (40 to 60) | 50 % (40 to 60) | 0.5 (0.4 to 0.6), below the floor | - |"
    assert f"| frozen decoder, 3 timesteps {row}" in page


def test_a_table_of_figures() -> None:
    figures = {
        "captions.f1": {
            "value": 0.5,
            "low": 0.4,
            "high": 0.6,
            "unit": "share",
            "floor": 0.9,
            "goal": 0.98,
        }
        | {"verdict": "below floor"},
        "captions.tokens": {"value": 50, "low": 40, "high": 60, "unit": "tokens"},
    }
    settings = {"num": 8, "seed": 1, "steps": 20, "guidance": 2.0}
    page = with_figures(
        f"a\n{BEGIN}\nold\n{END}\nb",
        {"settings": settings, "sections": {"captions": {"figures": figures}}},
    )
    assert page.startswith(f"a\n{BEGIN}\n8 held-out scenes of seed 1,")
    assert page.endswith(f"{END}\nb")
    assert "| captions: F1 of claims | 90 % | 98 % | 50 %, below the floor | 40 to 60 % |" in page
    assert "old" not in page
    assert "tokens" not in page


def test_a_page_without_marks() -> None:
    with pytest.raises(ValueError, match="the page has no lines"):
        with_figures("text", {"settings": {}, "sections": {}})


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_links_of_the_documentation(page: Path) -> None:
    for link in links(page):
        target = page.parent / link
        written_from_weights = target.resolve() == (DOCS / "tour.md").resolve()
        assert target.exists() or (written_from_weights and SHIPPED not in shipped_models()), link


def test_the_commands_write_their_pages(tmp_path: Path) -> None:
    write_settings([str(tmp_path / "settings.md")])
    assert (tmp_path / "settings.md").read_text(encoding="utf-8") == settings_page()
    page, evaluation = tmp_path / "page.md", tmp_path / "evaluation.json"
    page.write_text(f"a\n{BEGIN}\nold\n{END}\nb")
    settings = {"num": 8, "seed": 1, "steps": 20, "guidance": 2.0}
    evaluation.write_text(json.dumps({"settings": settings, "sections": {}}))
    write_figures([str(page), str(evaluation)])
    assert "8 held-out scenes" in page.read_text(encoding="utf-8")
    assert "old" not in page.read_text(encoding="utf-8")
