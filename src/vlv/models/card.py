"""The model card: licences, base models, training, figures and limits, from what is known; what is not known is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from vlv.config_files import known_repositories
from vlv.data.foreign import decode_text, printable, read_file
from vlv.errors import DataError, ModelFolderError
from vlv.pages import render
from vlv.storage import Json

CARD_NAME = "README.md"
UNKNOWN = "unknown"
_ABSOLUTE_PATH = re.compile(r"(?<![\w./])/(?:[\w.-]+/)*([\w.-]+)")
_HUB_LICENCES = {
    "mit": "mit",
    "apache-2.0": "apache-2.0",
    "creativeml open rail++-m": "openrail++",
    "openrail++": "openrail++",
}
"""Names of licences, in small letters, to the identifiers that the hub knows; any other is "other"."""


@dataclass(frozen=True)
class Origin:
    """Where a part comes from."""

    bases: tuple[str, ...] = ()
    """Models of the hub that it was made from; none where they are not known."""
    licence: str = ""
    """Empty where it is not known."""


@dataclass(frozen=True)
class Training:
    """One training run, as a card tells of it; nothing in it names a folder of this machine."""

    stage: str
    steps: int
    images_per_step: int
    num_images: int | None
    """Different images in the training data; None where they were streamed and not counted."""
    learning_rate: float
    schedule: str
    seed: int
    precision: str
    trains: str
    settings: Json = field(default_factory=dict)
    """All settings of the run, resolved."""
    figures: dict[str, float] = field(default_factory=dict)
    """The last on held-out images; empty where there were none."""
    num_held_out: int = 0


@dataclass(frozen=True)
class Provenance:
    """What is known of a model beyond its components."""

    origins: Mapping[str, Origin] = field(default_factory=dict)
    """By component."""
    trainings: tuple[Training, ...] = ()
    """Earliest first."""


# --- where parts come from ------------------------------------------------------------------------


def origin_of(source: str | Path, part: str, *, revision: str | None = None) -> Origin:
    """Where a part comes from, by what it is loaded from; nothing is fetched.

    Args:
        source: An id on the hub, or a folder, whose own card is asked.
        part: Name of the component.
        revision: Of an id on the hub.
    """
    folder, repo = Path(source).expanduser(), str(source)
    if folder.is_dir():
        return _of_card(folder / CARD_NAME, part)
    for known in known_repositories():
        if repo in known["ids"]:
            return Origin((repo,), known["licence"])
    try:
        cached = try_to_load_from_cache(repo, CARD_NAME, revision=revision)
    except HFValidationError:  # a folder that is not here
        return Origin()
    licence = _of_card(Path(cached), part).licence if isinstance(cached, str) else ""
    return Origin((repo,), licence)


def named_parts(references: Mapping[str, Mapping[str, str | None]]) -> Provenance:
    """What is known of a model by those parts that are only named in it."""
    return Provenance(
        {
            part: origin_of(str(where["repo"]), part, revision=where.get("revision"))
            for part, where in references.items()
        }
    )


def _of_card(card: Path, part: str) -> Origin:
    """What a card says of a part, or else of the whole."""
    matter = read_front_matter(card)
    parts, bases = matter.get("parts"), matter.get("base_model") or []
    licence = parts.get(part) if isinstance(parts, dict) else _whole_licence(matter)
    bases = [bases] if isinstance(bases, str) else bases
    return Origin(tuple(map(str, bases)), "" if licence in (None, UNKNOWN) else str(licence))


def _whole_licence(matter: Mapping[str, object]) -> object:
    return matter.get("license_name") or matter.get("license")


def past_trainings(folder: Path) -> tuple[Training, ...]:
    """The runs that the card of a model folder tells of."""
    runs = read_front_matter(folder / CARD_NAME).get("training") or []
    try:
        return tuple(Training(**run) for run in runs)
    except TypeError as error:
        raise ModelFolderError(
            f"the card {folder / CARD_NAME} tells of its training in a way that is not understood ({error}); "
            "remove `training` from its first lines"
        ) from error


def read_card(folder: Path) -> str | None:
    """Text of the card of a model folder; None where it has none.

    Raises:
        ModelFolderError: It is no text.
    """
    card = folder / CARD_NAME
    return _read_text(card) if card.is_file() else None


def _read_text(card: Path) -> str:
    try:
        return decode_text(read_file(card), printable(card))
    except DataError as error:
        raise ModelFolderError(f"{error}; remove it, or copy the model again") from error


def read_front_matter(card: Path) -> Json:
    """YAML between the two lines of dashes at the top of a model card; empty without one.

    Raises:
        ModelFolderError: It is no YAML.
    """
    text = _read_text(card) if card.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return {}
    try:
        matter = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelFolderError(f"the front matter of {card} is no YAML ({reason})") from error
    return matter if isinstance(matter, dict) else {}


# --- writing --------------------------------------------------------------------------------------


def model_card(
    name: str, components: Mapping[str, object], provenance: Provenance | None = None
) -> str:
    """Write the card of a model.

    Args:
        name: Name of the model, a heading and the argument of ``from_pretrained``.
        components: Component name to component; None where it is absent.
        provenance: Where the parts come from, and how they were trained.

    Returns:
        Markdown with the metadata block of the hub.
    """
    known = provenance or Provenance()
    present = {part: component for part, component in components.items() if component is not None}
    origins = {part: known.origins.get(part, Origin()) for part in present}
    matter = _front_matter(origins, known.trainings)
    return render(
        "card.md.jinja",
        name=name,
        matter=yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=100),
        parts={
            part: {
                "name": part,
                "kind": type(component).__name__,
                "size": _num_parameters(component),
                **asdict(origins[part]),
            }
            for part, component in present.items()
        },
        unknown=[part for part, origin in origins.items() if not origin.licence],
        trainings=known.trainings,
        figures=_FIGURES,
    )


def forget_paths(text: str) -> str:
    """Of absolute paths only the last name stays, for they say nothing elsewhere."""
    return _ABSOLUTE_PATH.sub(r"\1", text)


def rename_card(card: str, name: str) -> str:
    """The same card for the model under another name, in its heading and in the code that loads it."""
    heading = re.search(r"^# (.+)$", card, re.MULTILINE)
    if heading is None:
        return card
    card = card.replace(heading[0], f"# {name}", 1)
    card = card.replace(f"--adapter {heading[1]}\n", f"--adapter {name}\n")
    return card.replace(f'from_pretrained("{heading[1]}")', f'from_pretrained("{name}")')


def unknown_licences(card: str) -> list[str]:
    """The parts of which a card says that their licence is unknown."""
    return re.findall(r"^\| `(\w+)` \|.*\*\*unknown\*\* \|$", card, re.MULTILINE)


def _front_matter(origins: Mapping[str, Origin], trainings: Sequence[Training]) -> Json:
    licences = {part: origin.licence or UNKNOWN for part, origin in origins.items()}
    bases = _unique(base for origin in origins.values() for base in origin.bases)
    matter: Json = {
        "library_name": "vlv",
        "pipeline_tag": "image-to-text",
        "tags": ["vision-language-vision", "image-captioning"],
        **_whole(_unique(licences.values())),
    }
    if bases:
        matter["base_model"] = bases
    matter["parts"] = licences
    if trainings:
        matter["training"] = [asdict(training) for training in trainings]
    return matter


def _whole(licences: Sequence[str]) -> dict[str, str]:
    """The licence of the whole for the hub: that of all parts, or that each has its own."""
    if UNKNOWN in licences:
        return {"license": UNKNOWN}
    if len(licences) == 1 and licences[0].lower() in _HUB_LICENCES:
        return {"license": _HUB_LICENCES[licences[0].lower()]}
    return {"license": "other", "license_name": "one-for-each-part"}


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _num_parameters(component: object) -> str:
    if not isinstance(component, nn.Module):
        return ""
    return f"{sum(p.numel() for p in component.parameters()) / 1e6:.1f} M"


_FIGURES = {
    "denoising_z": "denoising loss given z",
    "denoising_null": "denoising loss given no text",
    "denoising_true": "denoising loss given the true caption",
    "share_null_to_true": "share of the true caption's gain over no text that z recovers",
    "held_out_loss": "loss that was trained with",
    "held_out_caption": "cross-entropy of captions, nats per token",
    "held_out_denoising": "denoising loss of stage 2",
    "held_out_reward": "reward of greedy captions, 1 explains as much as z",
    "held_out_tokens": "tokens of a greedy caption",
    "held_out_repetition": "share of runs of four words that a greedy caption repeats",
    "held_out_distinct_share": "different captions among the greedy ones",
    "held_out_unfinished_share": "greedy captions that did not end by themselves",
}
