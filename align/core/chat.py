"""Messages and token ids: the one path from a conversation to what a model reads, in training and in sampling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

from align.core.engines.base import Prompt
from align.core.errors import DataError, ModelError
from align.core.records import Messages, Row
from align.core.turns import Conversation, pieces, plain_end, special_tokens

IGNORED = -100
"""The label of a token that the loss does not count."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence as a trainer feeds it.

    Attributes:
        ids: its tokens.
        turns: of each supervised message the first token, the one after its end token, and its weight, in order.
    """

    ids: list[int]
    turns: list[tuple[int, int, float]]

    @property
    def labels(self) -> list[int]:
        """The ids where they are supervised, `IGNORED` elsewhere."""
        labels = [IGNORED] * len(self.ids)
        for start, end, _ in self.turns:
            labels[start:end] = self.ids[start:end]
        return labels


def prompt_ids(tokenizer: Any, prompt: Prompt, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Token ids of a prompt as every engine and every trainer feeds it, ready for the first sampled token.

    Messages are rendered by the tokenizer's own chat template with the generation prompt added. The template alone
    decides on a BOS token, so there are never two. A string is tokenised as it is, no special tokens added; ids
    are returned as they are.

    Args:
        tools: what the model may call, as JSON schemas.

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
    messages = _for_templates("the prompt", cast("Messages", prompt))
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception as problem:  # templates raise jinja2's errors, and through filters any other
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses a prompt: {problem}") from problem
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def row_prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """See `prompt_ids`; of a row's prompt, with the row's `tools` where it has some.

    Raises:
        DataError: as there; or the tools are no JSON schemas.
        ModelError: as there; or the template leaves the tools out.
    """
    name = f"prompt {row['prompt_id']}"
    tools = tools_of(name, row.get("tools"))
    ids = prompt_ids(tokenizer, row["prompt"], tools)
    if tools and ids == prompt_ids(tokenizer, row["prompt"]):
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template leaves out the tools that a row has ({name}), so the model "
            "would not see them; take a template that shows them, or leave them out with columns: {tools: null}"
        )
    return ids


def tools_of(name: str, given: Any) -> list[dict[str, Any]] | None:
    """The tools of a row (its column `tools`): a list of JSON schemas, or that as JSON text; None where it has none.

    Raises:
        DataError: they are no such thing.
    """
    tools = given
    if isinstance(given, str):
        try:
            tools = json.loads(given)
        except ValueError:
            tools = given or None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{name}: tools is {given!r:.60}; a list of JSON schemas was expected (or that as JSON text); where the "
            "column means something else, leave it out with columns: {tools: null}"
        )
    return tools


def encode_rows(tokenizer: Any, rows: Iterable[Row], all_turns: bool = False) -> Iterator[list[Tokens]]:
    """Each row's prompt and completion as a trainer feeds them: one sequence, or several where the template needs it.

    Supervised are, of every assistant message of the completion, the tokens that follow the generation prompt up to
    and with the end-of-turn token; not the newline that some templates put after it. A sequence ends at its last
    end-of-turn token. What comes before a supervised turn is what the model sees when it is sampled there,
    `prompt_ids(tokenizer, messages before it)`: no token reaches over the border between the two.

    Some templates show a turn otherwise once the conversation goes on (they leave out earlier thoughts, or move the
    system prompt). Then no single sequence is what the model sees at every turn, and a sequence of its own is made for
    each turn that is shown otherwise later.

    A message's `weight` (0 or more, 1 where it has none) counts for all its tokens; one of weight 0 is not supervised.
    A row's `tools` (a list of JSON schemas, or that as JSON text) are given to the template.

    Args:
        all_turns: supervise the assistant messages of the prompt as well.

    Raises:
        DataError: nothing is supervised in a row, a weight or a tool is no such thing, or the template can't be cut at
            its turns; names the row.
        ModelError: the template gives a turn no end token, shows no tools or tool calls, or the tokens begin with two
            BOS.
    """
    for chunk in _chunks(rows):
        conversations = []
        for number, row in chunk:
            name = _name(row, number)
            messages = _for_templates(name, [*row["prompt"], *row["completion"]])
            first = 0 if all_turns else len(row["prompt"])
            conversations.append(Conversation(name, messages, first, tools_of(name, row.get("tools")), weighted=True))
        yield from _encode(tokenizer, conversations)


def encode_demonstration(
    tokenizer: Any, prompt: Messages, completion: Messages, all_turns: bool = False
) -> tuple[list[int], list[int]]:
    """See `encode_demonstrations`; for one row."""
    return next(encode_demonstrations(tokenizer, [{"prompt": prompt, "completion": completion}], all_turns))


def encode_demonstrations(
    tokenizer: Any, rows: Iterable[Row], all_turns: bool = False
) -> Iterator[tuple[list[int], list[int]]]:
    """As `encode_rows`, where a row must be one sequence: its ids and labels. All supervised messages count alike.

    Raises:
        DataError: as there; or the template shows a supervised turn otherwise once the conversation goes on.
        ModelError: as there.
    """
    for chunk in _chunks(rows):
        conversations = []
        for number, row in chunk:
            name = _name(row, number)
            messages = _for_templates(name, [*row["prompt"], *row["completion"]])
            first = 0 if all_turns else len(row["prompt"])
            conversations.append(Conversation(name, messages, first, tools_of(name, row.get("tools"))))
        for conversation, sequences in zip(conversations, _encode(tokenizer, conversations), strict=True):
            if len(sequences) > 1:
                raise DataError(
                    f"{conversation.name}: the chat template of {tokenizer.name_or_path} renders a conversation "
                    "differently once it goes on, so it is no single sequence; give one row per assistant turn, or a "
                    "simpler template"
                )
            yield sequences[0].ids, sequences[0].labels


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

    A row's `tools` are given to the template as in `encode_rows`.

    Raises:
        DataError: a completion is not one assistant message, or has a weight; names the row.
        ModelError: as for `encode_rows`.
    """
    for chunk in _chunks(rows):
        conversations = []
        for number, row in chunk:
            name = _name(row, number)
            for side in ("chosen", "rejected"):
                if [m["role"] for m in row[side]] != ["assistant"]:
                    roles = ", ".join(m["role"] for m in row[side]) or "nothing"
                    raise DataError(f"{name}: {side} must be one assistant message, it has {roles}")
                if row[side][0].get("weight", 1) != 1:
                    raise DataError(
                        f"{name}: {side} has a weight ({row[side][0]['weight']}); messages have weights in "
                        "demonstrations alone, so leave it out"
                    )
                messages = _for_templates(name, [*row["prompt"], *row[side]])
                tools = tools_of(name, row.get("tools"))
                conversations.append(Conversation(name, messages, len(row["prompt"]), tools))
        encoded = _encode(tokenizer, conversations)
        for (chosen,) in encoded:
            (rejected,) = next(encoded)
            start = chosen.turns[0][0]
            yield chosen.ids[:start], chosen.ids[start:], rejected.ids[start:]


def _encode(tokenizer: Any, conversations: Sequence[Conversation]) -> Iterator[list[Tokens]]:
    """The sequences of each conversation."""
    special = special_tokens(tokenizer)
    end = plain_end(tokenizer, special)
    cut = [pieces(tokenizer, special, end, conversation) for conversation in conversations]
    # In one call of the tokenizer, of each sequence the whole text, and all pieces or (of one turn) the first.
    texts: list[str] = []
    for sequences in cut:
        for parts, _ in sequences:
            texts += ["".join(parts), *(parts if len(parts) > 2 else parts[:1])]
    flat = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    for sequences in cut:
        found = []
        for parts, weights in sequences:
            whole = next(flat)
            ids_of = [next(flat) for _ in (parts if len(parts) > 2 else parts[:1])]
            if len(parts) == 2 and whole[: len(ids_of[0])] == ids_of[0]:
                ids_of.append(whole[len(ids_of[0]) :])
            elif list(chain.from_iterable(ids_of)) != whole:
                ids_of = _apart(tokenizer, parts)
            ids: list[int] = []
            turns = []
            for place, part in enumerate(ids_of):
                if place % 2 and weights[place // 2]:
                    turns.append((len(ids), len(ids) + len(part), weights[place // 2]))
                ids += part
            ids = ids[: turns[-1][1]]  # what follows is of weight 0 and teaches nothing
            if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
                raise ModelError(
                    f"{tokenizer.name_or_path}: its chat template gives two BOS tokens ({tokenizer.bos_token!r}); "
                    "mend the template"
                )
            found.append(Tokens(ids, turns))
        yield found


def _apart(tokenizer: Any, parts: Sequence[str]) -> list[list[int]]:
    """Each part's ids as they follow what is before it; tokenised alone where a token would reach over the border."""
    found: list[list[int]] = []
    ids: list[int] = []
    text = ""
    for part in parts:
        text += part
        longer = tokenizer(text, add_special_tokens=False)["input_ids"]
        alone = longer[: len(ids)] != ids
        found.append(tokenizer(part, add_special_tokens=False)["input_ids"] if alone else longer[len(ids) :])
        ids = ids + found[-1]
    return found


def _for_templates(name: str, messages: Messages) -> list[dict[str, Any]]:
    """Messages as templates want them: a call's arguments as an object, where OpenAI's files have them as JSON text."""
    if not any(message.get("tool_calls") for message in messages):
        return cast("list[dict[str, Any]]", messages)
    found: list[dict[str, Any]] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or []:
            function = call.get("function") or call
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments or "{}")
                except ValueError as problem:
                    raise DataError(
                        f"{name}: the arguments of a call of {function.get('name')} are no JSON: {arguments!r:.60}"
                    ) from problem
                function = {**function, "arguments": arguments}
            calls.append({**call, "function": function} if "function" in call else function)
        found.append({**message, "tool_calls": calls} if calls else dict(message))
    return found


def _name(row: Row, number: int) -> str:
    return f"row {number} (prompt_id {row['prompt_id']})" if row.get("prompt_id") is not None else f"row {number}"


def _chunks(rows: Iterable[Row], size: int = 256) -> Iterator[list[tuple[int, Row]]]:
    """Rows with their numbers, some at a time: the tokenizer is quickest on many texts at once."""
    numbered = enumerate(rows)
    while chunk := list(islice(numbered, size)):
        yield chunk
