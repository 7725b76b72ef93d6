"""What a caption decoder is asked for: a style that it was taught or words of the user's own, and a length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlv.errors import ConfigError
from vlv.models.arguments import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlv.models.captioner import CaptionDecoderConfig
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


def with_length(instruction: str | None, num_words: int) -> str:
    """An instruction that also states how many words the text has.

    >>> with_length("Short:", 12), with_length(None, 12)
    ('Short: 12 words.', '12 words.')
    """
    length = f"{num_words} words."
    return length if instruction is None else f"{instruction} {length}"


def count_words(text: str) -> int:
    """The length of a text as instructions state it: stretches without spaces."""
    return len(text.split())


def instructions_of(how: Generation, count: int, config: CaptionDecoderConfig) -> list[str | None]:
    """The instruction for each of `count` images; None asks for the plain caption.

    Args:
        how: With a style, a prompt, or neither, and perhaps a length.
        count: Images.
        config: What the model was taught.

    Raises:
        ConfigError: The model was taught no instructions, not this style, or no lengths.
    """
    if how.words is not None and not config.obeys_lengths:
        raise ConfigError(
            "this model was not taught to write so many words; leave words out, or cut its captions (--max-words)"
        )
    if how.style is not None:
        prompts: list[str | None] = [instruction_of(how.style, config.styles or {})] * count
    else:
        prompts = how.prompts(count)
        if any(prompt is not None for prompt in prompts) and not config.takes_instructions:
            raise ConfigError(
                "this model writes plain captions and takes no instructions; leave the prompt out"
            )
    return prompts if how.words is None else [with_length(x, how.words) for x in prompts]
