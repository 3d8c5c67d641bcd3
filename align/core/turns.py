"""A conversation cut at its turns: which text of what the template renders is to be learnt, and up to where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from align.core.errors import DataError, ModelError


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is to be encoded: a row's name for messages, its turns, the first that may be supervised, and its tools."""

    name: str
    messages: list[dict[str, Any]]
    first: int
    tools: list[dict[str, Any]] | None
    weighted: bool = False


def pieces(
    tokenizer: Any, special: list[str], end: str | None, conversation: Conversation
) -> list[tuple[list[str], list[float]]]:
    """A conversation as sequences: of each the texts before, of, between, … its turns, and the weights of the turns.

    The turns are the assistant messages that may be supervised.
    """
    name, messages, tools = conversation.name, conversation.messages, conversation.tools
    found: list[tuple[list[str], list[float]]] = []
    said = ""  # the text of the sequence that is growing
    for place, message in enumerate(messages):
        if place < conversation.first or message["role"] != "assistant":
            continue
        weight = _weight(name, message) if conversation.weighted else 1.0
        start = _render(tokenizer, name, messages[:place], tools, generation_prompt=True)
        upto = _render(tokenizer, name, messages[: place + 1], tools, generation_prompt=False)
        turn = _turn(tokenizer, conversation, place, start, upto)
        turn = turn[: _end_of_turn(tokenizer, special, end, turn, message)]
        if not found or not start.startswith(said):
            found.append(([], []))
            said = ""
        found[-1][0].extend((start[len(said) :], turn))
        found[-1][1].append(weight)
        said = start + turn
    if not found:
        roles = ", ".join(m["role"] for m in messages[conversation.first :]) or "nothing"
        raise DataError(f"{name}: no token to learn from: its completion has no assistant message, it has {roles}")
    if tools and not any(_name_of(tools[0]) in part for parts, _ in found for part in parts):
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template leaves out the tools that a row has ({name}), so they can't "
            "be learnt; take a template that shows them, or leave them out with columns: {tools: null}"
        )
    found = [sequence for sequence in found if any(sequence[1])]
    if not found:
        raise DataError(f"{name}: no token to learn from: every assistant message has the weight 0; leave the row out")
    return found


def _turn(tokenizer: Any, conversation: Conversation, place: int, start: str, upto: str) -> str:
    """What follows the generation prompt in the conversation as it is rendered up to a turn.

    A template may show what comes before otherwise once it is answered; then the turn begins where its last generation
    prompt ends (without one, where the last message and what the template puts behind it end).

    Raises:
        DataError: the template begins a turn otherwise than its generation prompt does.
    """
    if upto.startswith(start):
        return upto[len(start) :]
    messages = conversation.messages
    earlier = _render(tokenizer, conversation.name, messages[:place], conversation.tools, generation_prompt=False)
    before = start[len(earlier) :] if start.startswith(earlier) else ""
    if not before and place:  # a template without a generation prompt: from the last message on
        asked = str(messages[place - 1]["content"]).strip()
        before = start[start.rfind(asked) :] if asked in start else ""
    stop = upto.rfind(str(messages[place]["content"]).strip())
    at = upto.rfind(before, 0, stop if stop > 0 else None) if before else -1
    if at < 0:
        raise DataError(
            f"{conversation.name}: the chat template of {tokenizer.name_or_path} begins an assistant turn otherwise "
            f"than its generation prompt does ({start[-40:]!r}), so nobody knows what is to be learnt; mend the "
            "template, or the turn's content (some templates want its thoughts apart)"
        )
    return upto[at + len(before) :]


def _end_of_turn(tokenizer: Any, special: list[str], end: str | None, turn: str, message: dict[str, Any]) -> int:
    """Where the end-of-turn token ends in a rendered turn.

    It is the first special token after the content; where the content isn't there as it was written, or calls follow
    it, the last one of the kind that ends a plain answer, else the last special token.
    """
    content = (message["content"] or "").strip()
    for call in message.get("tool_calls") or []:
        if _name_of(call) not in turn:
            raise ModelError(
                f"{tokenizer.name_or_path}: its chat template leaves out tool calls (such as {_name_of(call)}), so "
                "they can't be learnt; take a template that shows them, or leave such rows out"
            )
    found = turn.find(content) if content else -1
    if found >= 0 and not message.get("tool_calls"):
        after = found + len(content)
        ends = [(turn.find(token, after), -len(token)) for token in special if token in turn[after:]]
    elif end is not None and end in turn:
        return turn.rfind(end) + len(end)
    else:
        ends = [(-turn.rfind(token), -len(token)) for token in special if token in turn]
    if not ends:
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template puts no special token after an assistant turn, so a model "
            f"would never learn to stop; the turn reads {turn[-60:]!r}"
        )
    start, minus_length = min(ends)
    return abs(start) - minus_length


def _name_of(tool: dict[str, Any]) -> str:
    """The name of a tool or of a call, in OpenAI's shape or bare."""
    return str((tool.get("function") or tool).get("name"))


def _weight(name: str, message: dict[str, Any]) -> float:
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise DataError(f"{name}: a message has the weight {weight!r:.40}; a number of at least 0 was expected")
    return float(weight)


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts of the tokens that no ordinary text is tokenised to."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list({*added, *tokenizer.all_special_tokens} - {""})


def plain_end(tokenizer: Any, special: list[str]) -> str | None:
    """The special token after a plain answer; None where the template refuses one."""
    asked = [{"role": "user", "content": "x"}]
    try:
        start = _render(tokenizer, "x", asked, None, generation_prompt=True)
        upto = _render(tokenizer, "x", [*asked, {"role": "assistant", "content": "x"}], None, generation_prompt=False)
    except DataError:
        return None
    turn = upto[len(start) :] if upto.startswith(start) else ""
    ends = [(turn.find(token), -len(token), token) for token in special if token in turn]
    return min(ends)[2] if ends else None


def _render(
    tokenizer: Any, name: str, messages: Any, tools: list[dict[str, Any]] | None, generation_prompt: bool
) -> str:
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.name_or_path or 'tokenizer'}: it has no chat template; "
            "add one (chat_template.jinja) to the model's folder"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except Exception as problem:  # templates raise jinja2's errors, and through filters any other
        raise DataError(f"{name}: the chat template of {tokenizer.name_or_path} refuses it: {problem}") from problem
