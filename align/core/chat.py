"""Messages and token ids: the one path from a conversation to what a model reads, in training and in sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from align.core.engines.base import Prompt
from align.core.errors import DataError, ModelError


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as every engine and every trainer feeds it, ready for the first sampled token.

    Messages are rendered by the tokenizer's own chat template with the generation prompt added. The template alone
    decides on a BOS token, so there are never two. A string is tokenised as it is, no special tokens added; ids
    are returned as they are.

    Raises:
        DataError: the template refuses these messages (a role it doesn't know, turns that don't alternate).
        ModelError: the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if len(prompt) == 0 or not isinstance(prompt[0], dict):
        return [int(i) for i in cast("Sequence[int]", prompt)]
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.name_or_path or 'tokenizer'}: it has no chat template, and the prompt is a list of messages; "
            "give prompts as text, or add a template (chat_template.jinja) to the model's folder"
        )
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as problem:  # templates raise jinja2's errors, and through filters any other
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses a prompt: {problem}") from problem
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
