"""What a caption decoder is asked for: a style that it was taught or words of the user's own, and a length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlv.errors import ConfigError
from vlv.models.arguments import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlv.models.captioner_config import CaptionDecoderConfig
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


def with_known(instruction: str | None, known: str) -> str:
    """An instruction behind what is known about the image.

    >>> with_known("Short:", "red cube, at night."), with_known(None, "Rex")
    ('Known: red cube, at night. Short:', 'Known: Rex.')
    """
    text = f"Known: {' '.join(known.split()).rstrip('.')}."
    return text if instruction is None else f"{text} {instruction}"


def count_words(text: str) -> int:
    """The length of a text as instructions state it: stretches without spaces."""
    return len(text.split())


def instructions_of(how: Generation, count: int, config: CaptionDecoderConfig) -> list[str | None]:
    """The instruction for each of `count` images; None asks for the plain caption.

    Args:
        how: With a style, a prompt, or neither, and perhaps a length and what is known.
        count: Images.
        config: What the model was taught.

    Raises:
        ConfigError: The model was taught no instructions, not this style, no lengths, or not to use what is known.
    """
    facts = how.known_of(count)
    if any(fact is not None for fact in facts) and not config.uses_known:
        raise ConfigError(
            "this model was not taught to use what is known about an image; leave known out (--context-column)"
        )
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
    if how.words is not None:
        prompts = [with_length(prompt, how.words) for prompt in prompts]
    pairs = zip(prompts, facts, strict=True)
    return [prompt if fact is None else with_known(prompt, fact) for prompt, fact in pairs]
