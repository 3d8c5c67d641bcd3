"""Messages and token ids: the one path from a conversation to what a model reads, in training and in sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

from align.core.engines.base import Prompt
from align.core.errors import DataError, ModelError
from align.core.records import Messages, Row

IGNORED = -100
"""The label of a token that the loss does not count."""


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


def encode_demonstration(
    tokenizer: Any, prompt: Messages, completion: Messages, all_turns: bool = False
) -> tuple[list[int], list[int]]:
    """See `encode_demonstrations`; for one row."""
    return next(encode_demonstrations(tokenizer, [{"prompt": prompt, "completion": completion}], all_turns))


def encode_demonstrations(
    tokenizer: Any, rows: Iterable[Row], all_turns: bool = False
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of each row's prompt and completion, in order, as a trainer feeds them.

    Supervised are, of every assistant message of the completion, the tokens that follow the generation prompt up to
    and with the end-of-turn token; not the newline that some templates put after it. The sequence ends at the last
    end-of-turn token. The ids begin with `prompt_ids(tokenizer, prompt)`, what the model sees when it is sampled: no
    token reaches over the border between a prompt and a completion.

    Args:
        all_turns: supervise the assistant messages of the prompt as well.

    Raises:
        DataError: nothing is supervised in a row, or the template can't be cut at its turns; names the row.
        ModelError: the template gives a turn no end token, or the tokens begin with two BOS.
    """
    for chunk in _chunks(rows):
        conversations = []
        for number, row in chunk:
            messages = [*row["prompt"], *row["completion"]]
            first = 0 if all_turns else len(row["prompt"])
            conversations.append((_name(row, number), messages, first))
        yield from _encode(tokenizer, conversations)


def end_of_turn_id(tokenizer: Any) -> int:
    """The token that ends an assistant's turn in the tokenizer's template; a sampled turn must end with it."""
    ids, _ = encode_demonstration(
        tokenizer, [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "x"}]
    )
    return ids[-1]


def encode_pair(
    tokenizer: Any, prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[list[int], list[int], list[int]]:
    """See `encode_pairs`; for one row."""
    return next(encode_pairs(tokenizer, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]))


def encode_pairs(tokenizer: Any, rows: Iterable[Row]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of each row's prompt, chosen and rejected completion; both end at the end-of-turn token.

    Raises:
        DataError: a completion is not one assistant message; names the row.
        ModelError: as for `encode_demonstrations`.
    """
    for chunk in _chunks(rows):
        conversations = []
        for number, row in chunk:
            for side in ("chosen", "rejected"):
                if [m["role"] for m in row[side]] != ["assistant"]:
                    roles = ", ".join(m["role"] for m in row[side]) or "nothing"
                    raise DataError(f"{_name(row, number)}: {side} must be one assistant message, it has {roles}")
                conversations.append((_name(row, number), [*row["prompt"], *row[side]], len(row["prompt"])))
        encoded = _encode(tokenizer, conversations)
        for ids, labels in encoded:
            rejected_ids, _ = next(encoded)
            start = next(i for i, label in enumerate(labels) if label != IGNORED)
            yield ids[:start], ids[start:], rejected_ids[start:]


def _encode(tokenizer: Any, conversations: list[tuple[str, Messages, int]]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of a chunk of (name, messages, first message that may be supervised)."""
    special = _special_tokens(tokenizer)
    # Of each conversation: the text up to the start and up to the end of each supervised turn, growing.
    borders = [_borders(tokenizer, special, *conversation) for conversation in conversations]
    flat = tokenizer([text for texts in borders for text in texts], add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    at = 0
    for texts in borders:
        ids: list[int] = []
        labels: list[int] = []
        for place in range(len(texts)):
            longer = flat[at + place]
            if longer[: len(ids)] == ids:
                added = longer[len(ids) :]
            else:  # a token would reach over the border: the parts are tokenised apart
                before = texts[place - 1] if place else ""
                added = tokenizer(texts[place][len(before) :], add_special_tokens=False)["input_ids"]
            ids = ids + added
            labels += added if place % 2 else [IGNORED] * len(added)
        at += len(texts)
        if bos is not None and ids[:2] == [bos, bos]:
            raise ModelError(
                f"{tokenizer.name_or_path}: its chat template gives two BOS tokens ({tokenizer.bos_token!r}); "
                "mend the template"
            )
        yield ids, labels


def _borders(tokenizer: Any, special: list[str], name: str, messages: Messages, first: int) -> list[str]:
    """Of one conversation the texts up to each supervised turn's start and end, each the start of the next."""
    texts: list[str] = []
    for place, message in enumerate(messages):
        if place < first or message["role"] != "assistant":
            continue
        start = _render(tokenizer, name, messages[:place], generation_prompt=True)
        upto = _render(tokenizer, name, messages[: place + 1], generation_prompt=False)
        if not upto.startswith(start) or (texts and not start.startswith(texts[-1])):
            raise DataError(
                f"{name}: the chat template of {tokenizer.name_or_path} renders a conversation differently once it "
                "goes on, so its turns can't be told apart; give one row per assistant turn, or a simpler template"
            )
        turn = upto[len(start) :]
        texts += [start, start + turn[: _end_of_turn(tokenizer, special, turn, message["content"])]]
    if not texts:
        roles = ", ".join(m["role"] for m in messages[first:]) or "nothing"
        raise DataError(f"{name}: no token to learn from: its completion has no assistant message, it has {roles}")
    return texts


def _end_of_turn(tokenizer: Any, special: list[str], turn: str, content: str | None) -> int:
    """Where the end-of-turn token ends in a rendered turn: the first special token after the content."""
    content = (content or "").strip()
    found = turn.rfind(content) if content else 0
    after = found + len(content) if found >= 0 else 0
    ends = [(turn.find(token, after), -len(token)) for token in special if token in turn[after:]]
    if not ends:
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template puts no special token after an assistant turn, so a model "
            f"would never learn to stop; the turn reads {turn[-60:]!r}"
        )
    start, minus_length = min(ends)
    return start - minus_length


def _special_tokens(tokenizer: Any) -> list[str]:
    """Texts of the tokens that no ordinary text is tokenised to."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list({*added, *tokenizer.all_special_tokens} - {""})


def _render(tokenizer: Any, name: str, messages: Messages, generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.name_or_path or 'tokenizer'}: it has no chat template; "
            "add one (chat_template.jinja) to the model's folder"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except Exception as problem:  # templates raise jinja2's errors, and through filters any other
        raise DataError(f"{name}: the chat template of {tokenizer.name_or_path} refuses it: {problem}") from problem


def _name(row: Row, number: int) -> str:
    return f"row {number} (prompt_id {row['prompt_id']})" if row.get("prompt_id") is not None else f"row {number}"


def _chunks(rows: Iterable[Row], size: int = 256) -> Iterator[list[tuple[int, Row]]]:
    """Rows with their numbers, some at a time: the tokenizer is quickest on many texts at once."""
    numbered = enumerate(rows)
    while chunk := list(islice(numbered, size)):
        yield chunk
