"""Completions to rank, hostile ones among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.annotate.desk import Item, read_items
from align.core.records import Kind, Row
from align.core.writer import write_rows
from reward.annotations import completion_id

EVIL = (
    '<script>document.title="owned"</script><img src="https://evil.example/x.png" onerror="document.title=\'owned\'">'
    "</div></main></body></html><iframe src=https://evil.example></iframe>"
)
TURNED = "safe \u202egnp.exe\u202c and \u0007 a bell"
ARABIC = "البحر أزرق."
CODE = "So:\n\n```python\ndef f(x):\n    return x\n```\n\nDone."

PROMPTS: list[tuple[list[dict[str, str]], list[str]]] = [
    (
        [
            {"role": "system", "content": "回答要简短。"},
            {"role": "user", "content": f"Hello {EVIL}"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "صف البحر"},
        ],
        [ARABIC, EVIL, TURNED, CODE],
    ),
    ([{"role": "user", "content": "Name a colour."}], ["Red.", "Blue.", ""]),
    ([{"role": "user", "content": "Count."}], [f"{n} and on" for n in range(8)]),
    ([{"role": "user", "content": "The same?"}], ["yes", "yes "]),
    ([{"role": "user", "content": "Last."}], ["long " * 900, "short"]),
]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def ids(number: int) -> list[str]:
    """The ids of a prompt's completions, in the order in which they stand in the table."""
    return [completion_id(says(text)) for text in PROMPTS[number][1]]  # type: ignore[arg-type]


def make_table(folder: Path) -> Path:
    """All of them as a step would have written them; the fourth prompt has nothing to rank."""

    def rows() -> Any:
        for number, (prompt, texts) in enumerate(PROMPTS):
            for index, text in enumerate(texts):
                row: Row = {
                    "prompt_id": f"p{number}", "prompt": prompt, "split": "train", "source": "here", "task": None,
                    "family": "all", "reference": None, "sample_index": index, "completion": says(text),
                    "reward": None, "verdict": None, "detail": "", "generator": f"secret-{index}",
                    "finish_reason": "stop",
                }  # fmt: skip
                yield row

    write_rows(folder, rows(), Kind.COMPLETIONS)
    return folder


def make_items(folder: Path) -> list[Item]:
    return list(read_items(str(make_table(folder))))
