"""What a caption decoder is asked for: a style that it was taught, or words of the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlv.errors import ConfigError
from vlv.models.arguments import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlv.models.decoding import Generation


def instruction_of(style: str, styles: Mapping[str, str]) -> str:
    """What is asked for a style of captions.

    Args:
        style: Its name.
        styles: Instruction of each style that the model was taught, by name.

    Raises:
        ConfigError: The model was not taught it.
    """
    if not styles:
        raise ConfigError("this model writes plain captions and knows no styles; leave style out")
    if style not in styles:
        raise ConfigError(
            f"this model knows no style {style!r:.60}; {nearest(str(style), list(styles))}"
        )
    return styles[style]


def instructions_of(
    how: Generation, count: int, styles: Mapping[str, str], *, answers: bool
) -> list[str | None]:
    """The instruction for each of `count` images; None asks for the plain caption.

    Args:
        how: With a style, a prompt, or neither.
        count: Images.
        styles: As of `instruction_of`.
        answers: Whether the model answers questions.

    Raises:
        ConfigError: The model was taught no instructions, or not this style.
    """
    if how.style is not None:
        return [instruction_of(how.style, styles)] * count
    prompts = how.prompts(count)
    if any(prompt is not None for prompt in prompts) and not (styles or answers):
        raise ConfigError(
            "this model writes plain captions and takes no instructions; leave the prompt out"
        )
    return prompts
