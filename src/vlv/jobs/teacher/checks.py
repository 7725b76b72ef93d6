"""Is an answer a caption? Checks that need no model, and what to say when it is asked again."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.errors import ConfigError

if TYPE_CHECKING:
    from vlv.endpoint import Answer

_REFUSALS = re.compile(
    r"^\W*(i'?m (very |really |so )?(sorry|unable|not able|afraid)|(i am|we are) (sorry|unable|not able)|"
    r"sorry,? (but )?i|i (can ?not|can't|could not|won't|must decline)|as an ai|unfortunately,? i|"
    r"i apologi[sz]e|my apologies|(this|the) (request|content) (violates|goes against))",
    re.IGNORECASE,
)

# The commonest words of a language that are rare in the others.
_COMMON = {
    "en": "the and of with is are in on to its it that this from at by an",
    "de": "der die das und ist ein eine einen mit auf dem den von zu im nicht sind",
    "fr": "le la les des est une et dans sur avec un du au qui aux pas",
    "es": "el la los las una con y es en del un por al se que",
    "it": "il lo gli una con e è di del della che nel sono un sulla",
    "pt": "o os as uma com e é do da em um no na não ao",
    "nl": "de het een en van met op is zijn in dat aan naar niet",
}
_WORDS = {code: frozenset(text.split()) for code, text in _COMMON.items()}
LANGUAGES = ("any", *sorted(_WORDS))

_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


@dataclass(frozen=True)
class Wanted:
    """What an answer must be to count as a caption.

    Attributes:
        language: Code of the language, or ``any``.
        min_words: Fewest words.
        max_words: Most words; None sets no limit.
    """

    language: str = "en"
    min_words: int = 1
    max_words: int | None = None

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ConfigError(
                f"the language {self.language!r} is not recognised; choose one of {', '.join(LANGUAGES)}"
            )
        if self.min_words < 1 or (self.max_words or self.min_words) < self.min_words:
            raise ConfigError(
                f"{self.min_words} to {self.max_words} words is no range; 1 is the least"
            )

    def fault(self, answer: Answer) -> str | None:
        """What is wrong with an answer, as a key of `REMINDERS`; None when it is a caption."""
        text = answer.text.strip()
        straight = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        words = len(text.split())
        if (
            answer.refusal
            or answer.finish_reason.startswith("content_filter")
            or _REFUSALS.match(straight)
        ):
            return "refusal"
        if not any(character.isalnum() for character in text):
            return "cut" if answer.finish_reason == "length" else "empty"
        if is_loop(text):
            return "repetition"
        if answer.finish_reason == "length":
            return "cut"
        if self.language != "any" and is_other_language(text, self.language):
            return "language"
        if words < self.min_words:
            return "too short"
        return "too long" if self.max_words is not None and words > self.max_words else None

    def reminder(self, fault: str) -> str:
        """What is added to the prompt when it is asked again."""
        return REMINDERS[fault].format(
            min_words=self.min_words, max_words=self.max_words or 200, language=self.language
        )


FAULTS = {
    "empty": "it is empty",
    "refusal": "it is a refusal",
    "repetition": "it repeats itself",
    "cut": "it was cut off at the token limit",
    "language": "it is in another language",
    "too short": "it is too short",
    "too long": "it is too long",
}
REMINDERS = {
    "empty": "Answer with words.",
    "refusal": "This is an ordinary request: describe only what is visible, without naming or judging anyone.",
    "repetition": "Say everything once; do not repeat yourself.",
    "cut": "Keep it short: at most {max_words} words, and end with a complete sentence.",
    "language": "Write in the language with the code {language}.",
    "too short": "Use at least {min_words} words.",
    "too long": "Use at most {max_words} words.",
}


def is_loop(text: str) -> bool:
    """Whether a text runs in circles: it ends in a loop, or says one long sentence three times.

    >>> is_loop("A red cube. " + "A blue ball and " * 6), is_loop("A red cube and a blue ball.")
    (True, False)
    """
    words = re.findall(r"\w+", text.lower())
    for period in range(1, 31):
        needed = max(3 * period, 8)  # words that a loop of this period must fill
        if len(words) <= needed:
            break
        tail = words[-needed - period :]
        if all(tail[i] == tail[i + period] for i in range(len(tail) - period)):
            return True
    sentences = Counter(part.strip().lower() for part in re.split(r"[.!?]+", text))
    return any(count >= 3 and len(part.split()) >= 4 for part, count in sentences.items())


def is_other_language(text: str, wanted: str) -> bool:
    """Whether a text is clearly not in the language: another script, or the little words of another tongue.

    Doubtful ones, such as lists of tags and names, pass.

    >>> is_other_language("Ein roter Würfel und eine Kugel auf dem Boden, die im Licht ist.", "en")
    True
    >>> is_other_language("cube, sphere, red, low light", "en")
    False
    """
    letters = [character for character in text if character.isalpha()]
    if sum(_LATIN.match(character) is not None for character in letters) < len(letters) / 2:
        return True
    words = re.findall(r"\w+", text.lower())
    hits = {code: sum(word in common for word in words) for code, common in _WORDS.items()}
    best = max(hits.values())
    return best >= 3 and hits[wanted] * 2 < best
