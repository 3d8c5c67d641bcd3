"""What travels between stages: five kinds of thing, and the columns of the four that are datasets.

Column names are TRL's, in its conversational format: a prompt or a completion is a list of messages
`{"role": ..., "content": ...}`, so that any Hub tool reads what a step wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool.

    `weight` is what an assistant's turn counts in fine-tuning: 0 is not learnt from, 1 where it has none.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    weight: NotRequired[float]


Messages = list[Message]
Row = dict[str, Any]


class Kind(Enum):
    """The kinds of thing that a step takes or gives."""

    PROMPTS = "prompts"
    COMPLETIONS = "completions"
    DEMONSTRATIONS = "demonstrations"
    PREFERENCES = "preferences"
    ONTOLOGY = "ontology"
    MODEL = "model"
    REWARD_MODEL = "reward_model"

    @property
    def is_dataset(self) -> bool:
        """Whether a step that gives this kind writes rows, rather than a model folder."""
        return self not in (Kind.MODEL, Kind.REWARD_MODEL)


COLUMNS: dict[Kind, tuple[str, ...]] = {
    # `prompt` ends with the user's turn; `reference` is a JSON string (or null) whose shape the `task` defines;
    # `family` is what scores are reported by (the task's name where nothing finer is known).
    Kind.PROMPTS: ("prompt_id", "prompt", "split", "source", "task", "family", "reference"),
    Kind.COMPLETIONS: (
        "prompt_id", "prompt", "split", "source", "task", "family", "reference",
        "sample_index", "completion", "reward", "verdict", "detail", "generator",
    ),
    Kind.DEMONSTRATIONS: ("prompt_id", "prompt", "split", "completion"),
    Kind.PREFERENCES: ("prompt_id", "prompt", "split", "chosen", "rejected", "margin"),
    Kind.ONTOLOGY: ("tag", "count", "members", "parent", "examples"),
}  # fmt: skip
"""The columns that every dataset of a kind has. A stage may add more; they travel on."""

Split = Literal["train", "dev", "test"]
"""Decided once, by the hash of the root prompt, and inherited by all that is made from it. `dev` is for choosing
settings, `test` for reporting; only `train` is ever trained on."""

VerdictName = Literal["passed", "failed", "error"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one completion.

    `passed` and `failed` are facts about the completion. `error` means that nothing is known (a broken reference, an
    unknown constraint, a timeout): such a row is counted, and never paired or trained on.

    Attributes:
        verdict: passed, failed or error.
        reward: higher is better, 1.0 for passed and 0.0 for failed unless the verifier grades finer; None on error.
        detail: one line for a person: what was found and what was expected. For a timeout it begins with "timeout".
    """

    verdict: VerdictName
    reward: float | None
    detail: str = ""

    @staticmethod
    def of(passed: bool, detail: str = "") -> Verdict:
        """The verdict of a verifier that only says yes or no."""
        return Verdict("passed", 1.0, detail) if passed else Verdict("failed", 0.0, detail)

    @staticmethod
    def error(detail: str) -> Verdict:
        """Nothing is known of the completion, and why."""
        return Verdict("error", None, detail)


def message_text(messages: Sequence[Message] | str) -> str:
    """The text of a completion: the contents of its assistant messages, joined by newlines; a string is itself."""
    if isinstance(messages, str):
        return messages
    return "\n".join(m["content"] for m in messages if m["role"] == "assistant")
