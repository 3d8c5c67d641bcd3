"""The shapes of data that people have, and their way into our columns.

| known as | columns |
|---|---|
| ours, TRL | `prompt`, `completion`, `chosen`, `rejected` as text or messages |
| Alpaca | `instruction`, `input`, `output` (and `system`, `history`) |
| ShareGPT | `conversations`: turns with `from` and `value` |
| OpenAI, TRL | `messages`: turns with `role` and `content` |
| HH, UltraFeedback | `chosen` and `rejected` that begin with the same turns (text with "Human:" and "Assistant:" too) |
| RewardBench 2 | a prompt, and lists of texts: `chosen` are right, `rejected` wrong |
| LLMBar | `input`, `output_1` and `output_2`, and `label`: the number of the better one |
| samples | a question and a list of answers; `reward` or `verdict` beside it are lists as long |
| GSM8K | `question`, `answer` that ends with `#### number`; becomes a maths reference |
| plain | one of `prompt`, `instruction`, `question`, with one of `completion`, `output`, `response`, `answer` or none |

Columns that are not needed travel on as they are; lists and objects that no kind knows become JSON text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.core.errors import DataError
from align.core.records import Kind, Messages, Row
from align.core.unfold import LLMBAR, SIDES, Record, are_texts, each_answer, each_pair, two_outputs

VERSION = 2
"""Raised when the same file would now give other rows."""

QUESTIONS = ("prompt", "instruction", "question")
ANSWERS = ("completion", "output", "response", "answer")
CHATS = ("messages", "conversations")
_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "human": "user", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
_BESIDE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "weight")
"""Keys of a turn that are kept beside its role and content."""
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
GSM8K_ANSWER = re.compile(r"####\s*(\S[^\n]*?)\s*$")
KNOWN = (
    "prompt+completion, prompt+chosen+rejected, chosen+rejected, messages, conversations (ShareGPT), "
    "instruction+input+output (Alpaca), question+answer (GSM8K), or a prompt alone (prompt, instruction, question)"
)


Shape = Callable[[Record, str], list[Row]]
"""From a record and its place to the rows made of it."""


def shape_of(columns: Sequence[str], kind: Kind | None, where: str) -> Shape:
    """How records with these columns become rows of a kind.

    Args:
        columns: the names of a record's columns.
        kind: what is wanted; None for rows that are taken as they are.
        where: the place of the first record, for messages.

    Returns:
        a function of a record and its place that gives the rows made of it: one, but two COMPLETIONS of a preference.

    Raises:
        DataError: the columns are of no shape known that gives this kind.
    """
    question = next((name for name in QUESTIONS if name in columns), None)
    answer = next((name for name in ANSWERS if name in columns), None)
    chat = next((name for name in CHATS if name in columns), None)
    pair = "chosen" in columns and "rejected" in columns
    if set(columns) >= LLMBAR and kind in (Kind.PREFERENCES, Kind.COMPLETIONS) and not (pair or answer):
        named = shape_of([*(name for name in columns if name not in LLMBAR), "prompt", *SIDES], kind, where)
        return lambda record, place: named(two_outputs(record, place), place)
    if kind is None:
        return _as_it_is
    if kind is Kind.ONTOLOGY and "tag" in columns:
        return lambda record, _: [record]
    if kind is Kind.PREFERENCES and pair:
        return lambda record, place: [_preference(one, question, chat, place) for one in each_pair(record)]
    if kind is Kind.COMPLETIONS and pair and not answer:
        return lambda record, place: _of_a_pair(record, question, chat, place)
    if kind is Kind.COMPLETIONS and question and answer:
        return lambda record, place: [
            _answered(one, kind, question, answer, place) for one in each_answer(record, answer, place)
        ]
    if kind is Kind.DEMONSTRATIONS and question and answer:
        return lambda record, place: [_answered(record, kind, question, answer, place)]
    if kind in (Kind.DEMONSTRATIONS, Kind.COMPLETIONS) and chat:
        return lambda record, place: [_dialogue(record, kind, chat, place)]
    if kind is Kind.PROMPTS and question:
        return lambda record, place: [_answered(record, kind, question, answer, place)]
    if kind is Kind.PROMPTS and chat:
        return lambda record, place: [_dialogue(record, kind, chat, place)]
    if kind is Kind.PROMPTS and pair:
        return lambda record, place: [_without(_preference(record, None, None, place), "chosen", "rejected")]
    if pair and kind is Kind.DEMONSTRATIONS:
        raise DataError(
            f"{where}: these are preferences, demonstrations were expected; to learn from the chosen ones say "
            "columns: {chosen: completion, rejected: null}"
        )
    raise DataError(
        f"{where}: columns {', '.join(columns) or '(none)'} can't be read as {kind.value}; known are {KNOWN}. Name "
        "your columns with `columns`, such as columns: {my_question: prompt, my_answer: completion}"
    )


def _answered(record: Record, kind: Kind, question: str, answer: str | None, where: str) -> Row:
    """Rows of a question's column and, where there is one, an answer's."""
    row = _without(record, question, *_beside(question), "system", *([answer] if answer else []))
    row["prompt"] = _prompt(record, question, where)
    if isinstance(row.get("answer"), str):  # a gold answer beside the one that counts
        row["answer"] = messages(row["answer"], "assistant", "answer", where)
    if answer is None or (kind is Kind.PROMPTS and record[answer] is None):
        return row
    text = record[answer]
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    row["completion" if kind is not Kind.PROMPTS else "answer"] = messages(text, "assistant", answer, where)
    solved = GSM8K_ANSWER.search(text) if question == "question" and isinstance(text, str) else None
    if solved and record.get("reference") is None and record.get("task") in (None, "math"):
        row |= {"task": "math", "reference": json.dumps({"answer": solved[1].replace(",", "")})}
    return row


def _beside(question: str | None) -> tuple[str, ...]:
    """Alpaca's columns beside the instruction."""
    return ("input", "history") if question == "instruction" else ()


def _prompt(record: Record, question: str, where: str) -> Messages:
    text = record[question]
    if question == "instruction" and isinstance(text, str) and str(record.get("input") or "").strip():
        text = f"{text}\n\n{record['input']}"
    prompt = messages(text, "user", question, where)
    earlier: Messages = []
    if question == "instruction":
        for turn in record.get("history") or []:
            earlier += messages(turn[0], "user", "history", where) + messages(turn[1], "assistant", "history", where)
    return _system(record, where) + earlier + _ends_with_user(prompt, question, where)


def _system(record: Record, where: str) -> Messages:
    return messages(record["system"], "system", "system", where) if record.get("system") else []


def _ends_with_user(prompt: Messages, column: str, where: str) -> Messages:
    if len(prompt) > 1 and prompt[-1]["role"] == "assistant" and not prompt[-1]["content"].strip():
        prompt = prompt[:-1]  # "Assistant:" with nothing after it opens the answer
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        last = prompt[-1]["role"] if prompt else "nothing"
        raise DataError(f"{where}: {column} ends with {last}; a prompt ends with the user's turn")
    return prompt


def _dialogue(record: Record, kind: Kind, chat: str, where: str) -> Row:
    """Rows of a whole dialogue.

    A demonstration is cut before the first answer, so that all the assistant's turns are trained on; a completion and
    a prompt are cut before the last answer. What the user says after the last answer of a demonstration is left out.
    """
    turns = _system(record, where) + messages(record[chat], "user", chat, where)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    row = _without(record, chat, "system", "prompt")
    if kind is Kind.PROMPTS and (not answers or turns[-1]["role"] == "user"):
        return row | {"prompt": _ends_with_user(turns, chat, where)}
    if not answers:
        raise DataError(f"{where}: {chat} has no answer of the assistant after a turn of the user")
    cut = answers[-1] if kind is not Kind.DEMONSTRATIONS else _first_answer(turns, answers)
    row["prompt"] = _ends_with_user(turns[:cut], chat, where)
    row["answer" if kind is Kind.PROMPTS else "completion"] = turns[cut : answers[-1] + 1]
    return row


def _first_answer(turns: Messages, answers: list[int]) -> int:
    """The first answer to a user; a greeting of the assistant before that is part of the prompt."""
    return next((i for i in answers if turns[i - 1]["role"] in ("user", "tool")), answers[0])


def _preference(record: Record, question: str | None, chat: str | None, where: str) -> Row:
    """A pair. Without a prompt of its own, the turns that both sides begin with are the prompt."""
    chosen = messages(record["chosen"], "assistant", "chosen", where)
    rejected = messages(record["rejected"], "assistant", "rejected", where)
    row = _without(record, *([question] if question else []), *_beside(question), "system", *CHATS)
    if len(chosen) > 1 or len(rejected) > 1:  # whole dialogues: they hold the prompt themselves
        if [turn["role"] for turn in (chosen[-1], rejected[-1])] != ["assistant", "assistant"]:
            raise DataError(f"{where}: chosen and rejected must both end with the assistant's turn")
        if chosen[:-1] != rejected[:-1]:
            raise DataError(f"{where}: chosen and rejected part before their last turn; one prompt must lead to both")
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
        if _system(record, where) and prompt[0]["role"] != "system":
            prompt = _system(record, where) + prompt
    elif question:
        prompt = _prompt(record, question, where)
    elif chat:
        prompt = _system(record, where) + messages(record[chat], "user", chat, where)
    else:
        raise DataError(f"{where}: chosen and rejected are single answers, and there is no prompt beside them")
    return row | {"prompt": _ends_with_user(prompt, "the prompt", where), "chosen": chosen, "rejected": rejected}


def _of_a_pair(record: Record, question: str | None, chat: str | None, where: str) -> list[Row]:
    """The completions of a record with chosen and rejected ones; of lists of texts each one once."""
    if not all(are_texts(record[side]) for side in SIDES):
        return _two_completions(_preference(record, question, chat, where))
    texts = [(text, side) for side in SIDES for text in record[side]]
    first = _preference(each_pair(record)[0], question, chat, where)
    rest = _without(first, *SIDES, "margin")
    return [
        rest | {
            "sample_index": number, "completion": messages(text, "assistant", side, where),
            "reward": float(side == "chosen"), "verdict": "passed" if side == "chosen" else "failed",
        }
        for number, (text, side) in enumerate(texts)
    ]  # fmt: skip


def _two_completions(row: Row) -> list[Row]:
    """A preference as two scored completions: the chosen one is better by the margin (1 where none is known)."""
    rest = _without(row, "chosen", "rejected", "margin")
    margin = row.get("margin")
    return [
        rest | {"sample_index": 0, "completion": row["chosen"], "reward": 1.0 if margin is None else float(margin)},
        rest | {"sample_index": 1, "completion": row["rejected"], "reward": 0.0},
    ]


def _as_it_is(record: Record, where: str) -> list[Row]:
    """For any rows: text becomes messages, and what can't be understood becomes null; one bad row stops nothing."""
    row = dict(record)
    sides = [(name, "assistant") for name in ("answer", "chosen", "rejected") if name in record]
    for name, role in (("prompt", "user"), ("completion", "assistant"), *sides):
        try:
            row[name] = messages(record.get(name), role, name, where)
        except DataError:
            row[name] = None
    return [row]


def messages(value: Any, role: str, column: str, where: str) -> Messages:
    """A list of messages from text (one message of `role`), "Human: … Assistant: …" text, or turns in either spelling.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, str):
        marks = list(_HH_TURN.finditer(value))
        if not marks or marks[0].start() != 0:
            return [{"role": role, "content": value}]
        ends = [mark.start() for mark in marks[1:]] + [len(value)]
        spoken = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": spoken[mark[1]], "content": value[mark.end() : end]} for mark, end in zip(marks, ends, strict=True)
        ]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column} is {value!r:.60}; text or a list of messages was expected")
    return [_turn(turn, column, where) for turn in value]


def _turn(turn: Any, column: str, where: str) -> Any:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: {column} holds {turn!r:.60}; messages with role and content were expected")
    said = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if said not in _ROLES:
        raise DataError(f"{where}: {column} has a turn of {said!r}; known roles are {', '.join(_ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where}: {column} has a turn whose content is {content!r:.60}; text was expected")
    more = {key: turn[key] for key in _BESIDE if turn.get(key) is not None}
    if _ROLES[said] != "assistant":  # of others nothing is learnt
        more.pop("weight", None)
    weight = more.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise DataError(f"{where}: {column} has a turn of the weight {weight!r:.40}; a number was expected")
    return {"role": _ROLES[said], "content": content, **more}


def _without(record: Mapping[str, Any], *names: str) -> Row:
    return {key: value for key, value in record.items() if key not in names}
