"""Configuration of the caption decoder: its language model, and what it was taught beside plain captions."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class CaptionDecoderConfig(PreTrainedConfig):
    """Configuration of `CaptionDecoder`.

    Attributes:
        llm_config: Configuration of any causal language model of transformers.
        text_width: D, the width of the context.
        ends_by_itself: Whether it was taught to end its captions. Where it was not, as the VLV
            authors' models, captions are tidied by default.
        styles: Instruction for each style of captions that it was taught, by the style's name.
        answers_questions: Whether it was taught to answer questions.
        obeys_lengths: Whether it was taught to write as many words as an instruction states.
        uses_known: Whether it was taught to use what is known about the image.
    """

    model_type = "vlv_caption_decoder"
    sub_configs_defaults = {  # noqa: RUF012
        "llm_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")
    }

    llm_config: dict[str, Any] | PreTrainedConfig | None = None
    text_width: int = 1024
    ends_by_itself: bool = True
    styles: dict[str, str] | None = None
    answers_questions: bool = False
    obeys_lengths: bool = False
    uses_known: bool = False

    @property
    def takes_instructions(self) -> bool:
        """Whether it was taught to follow any."""
        others = (self.answers_questions, self.obeys_lengths, self.uses_known)
        return bool(self.styles) or any(others)
