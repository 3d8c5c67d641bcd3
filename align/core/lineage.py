"""Lineage: the way of a row back to where it came from, read from the ids of the rows and the manifests of the steps.

A preference goes back to the completions it was paired from, those to their prompt with its tags, that one to the
prompt it was evolved from (`parent_id`), and the first prompt to the row of the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.manifest import Manifest
from align.core.records import Row
from align.core.store import Table

_SHOWN = 200
_SCORES = ("verdict", "reward", "detail", "generator", "finish_reason", "kept")


@dataclass(frozen=True)
class Link:
    """What one step holds of a row's history.

    Attributes:
        step: the step's name.
        stage: the stage's name.
        prompt_id: of the rows.
        rows: the step's rows with this id, in their order.
        engines: the generators that the step sampled from, by role.
    """

    step: str
    stage: str
    prompt_id: str
    rows: tuple[Row, ...]
    engines: Mapping[str, str]


def trace(run: Path, row_id: str) -> list[Link]:
    """The way back of a row, the last step first and the root prompt's first step last.

    Args:
        run: a run's folder (with a folder for each step), or the folder of a single step.
        row_id: a `prompt_id`, for all that the run made of that prompt; or `STEP/NUMBER`, for one row of one step
            (numbered from 0) and what it was made from.

    Raises:
        DataError: the run has no finished step with rows, or no row of this id.
    """
    steps = _steps(run)
    step, slash, number = row_id.rpartition("/")
    start = None
    if slash and number.isdigit():
        if step not in steps:
            raise DataError(f"{run}: has no finished step {step!r} with rows; it has {', '.join(steps)}")
        start = _row_at(steps[step][0], int(number), row_id)
        ancestors = _ancestors(steps, step)
        steps = {name: found for name, found in steps.items() if name in ancestors}
    links: list[Link] = []
    prompt_id = row_id if start is None else str(start["prompt_id"])
    seen: set[str] = set()
    while prompt_id and prompt_id not in seen:
        seen.add(prompt_id)
        parents: set[str] = set()
        for name in _latest_first(steps):
            table, manifest = steps[name]
            only = start is not None and name == step and prompt_id == start["prompt_id"]
            rows = [start] if only and start is not None else list(_rows_of(table, prompt_id))
            parents |= {str(row["parent_id"]) for row in rows if row.get("parent_id")}
            if rows:
                engines = {role: origin.name for role, origin in manifest.engines.items()}
                links.append(Link(name, manifest.stage, prompt_id, tuple(rows), engines))
        prompt_id = min(parents - seen, default="")
    if not links:
        some = next((row["prompt_id"] for table, _ in steps.values() for row in table.rows(["prompt_id"])), "none")
        raise DataError(
            f"{run}: no row of prompt_id {row_id!r} in the steps {', '.join(steps)}; give an id such as {some}, or "
            f"STEP/NUMBER such as {next(iter(steps))}/0"
        )
    return links


def _steps(run: Path) -> dict[str, tuple[Table, Manifest]]:
    """The finished steps that have rows with ids, by name; folders outside that they were made from, by path."""
    waiting = [run] if (run / "manifest.json").is_file() else sorted(p for p in run.glob("*") if p.is_dir())
    named = {folder: folder.name for folder in waiting if folder != run}
    found: dict[str, tuple[Table, Manifest]] = {}
    while waiting:
        folder = waiting.pop(0)
        manifest = Manifest.read(folder)
        if manifest is None or not [*(folder / "data").glob("*.parquet")]:
            continue
        name = manifest.step if folder == run else named.get(folder, str(folder))
        if name in found:
            continue
        table = Table.open(folder)
        if "prompt_id" in table.columns:
            found[name] = (table, manifest)
        outside = [origin.path for origin in manifest.inputs.values() if origin.step is None and origin.path]
        waiting += [Path(path) for path in outside if Path(path).is_dir()]
    if not found:
        raise DataError(f"{run}: has no finished step with rows; give the folder of a run (it holds a folder a step)")
    return found


def _parents(manifest: Manifest) -> set[str]:
    return {origin.step or origin.path for origin in manifest.inputs.values()}


def _ancestors(steps: Mapping[str, tuple[Table, Manifest]], step: str) -> set[str]:
    found: set[str] = set()
    waiting = {step}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= (_parents(steps[name][1]) & set(steps)) - found
    return found


def _latest_first(steps: Mapping[str, tuple[Table, Manifest]]) -> list[str]:
    """The steps so that each comes after all that were made from it."""
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = 0  # a manifest that names itself ends here
            depth[name] = 1 + max((depth_of(p) for p in _parents(steps[name][1]) if p in steps), default=0)
        return depth[name]

    return sorted(steps, key=lambda name: (-depth_of(name), name))


def _rows_of(table: Table, prompt_id: str) -> Iterator[Row]:
    """The rows of one prompt; parquet's own statistics pass over row groups that can't hold it."""
    import pyarrow.parquet as pq

    for file in table.files:
        part = pq.read_table(file, columns=["prompt_id"], filters=[("prompt_id", "=", prompt_id)])
        if len(part):
            yield from (row for row in Table([file], table.name, "").rows() if row["prompt_id"] == prompt_id)


def _row_at(table: Table, number: int, row_id: str) -> Row:
    for position, row in enumerate(table.rows()):
        if position == number:
            return row
    raise DataError(f"{row_id}: {table.name} has {len(table)} rows, numbered from 0")


def render_trace(links: Sequence[Link]) -> str:
    """The way back as text, a block for each step, for `align trace`."""
    lines: list[str] = []
    picked = {
        side: (_text(row[side]), row.get(generator), row.get(f"{side}_index"))
        for link in links
        for row in link.rows
        for side, generator in (("chosen", "generator"), ("rejected", "rejected_generator"))
        if side in row
    }
    for link in links:
        sampled = "".join(f", {role} {name}" for role, name in link.engines.items())
        lines += [f"{link.step}  (stage {link.stage}{sampled})  prompt_id {link.prompt_id}"]
        for row in link.rows:
            lines += [f"    {line}" for line in _row_lines(row, picked)]
    root = links[-1].rows[0]
    if root.get("source"):
        number = root.get("source_row")
        lines += [f"source  {root['source']}" + (f", row {number} (from 0)" if number is not None else "")]
    return "\n".join(lines)


def _row_lines(row: Row, picked: Mapping[str, tuple[str, Any, Any]]) -> Iterator[str]:
    if "chosen" in row:
        yield f"margin {row.get('margin')}, split {row.get('split')}"
        for side, reward, generator in (
            ("chosen", "chosen_reward", "generator"), ("rejected", "rejected_reward", "rejected_generator"),
        ):  # fmt: skip
            yield f"{side} (reward {row.get(reward)}, generator {row.get(generator)}): {_short(_text(row[side]))}"
        return
    if "completion" in row:
        text = _text(row["completion"])
        scores = ", ".join(f"{name} {row[name]}" for name in _SCORES if row.get(name) not in (None, ""))
        this = (text, row.get("generator"), row.get("sample_index"))
        mark = next((f"  <- {side}" for side, one in picked.items() if _same(one, this)), "")
        yield f"completion {row.get('sample_index')} ({scores}): {_short(text)}{mark}"
        return
    yield f"prompt: {_short(_text(row['prompt']))}"
    for name in ("tags", "task", "family", "reference", "split", "parent_id"):
        if row.get(name):
            yield f"{name}: {', '.join(row[name]) if name == 'tags' else _short(str(row[name]))}"


def _same(one: tuple[str, Any, Any], other: tuple[str, Any, Any]) -> bool:
    """Whether a side of a pair is this completion, as far as the pair tells (its generator and index may be None)."""
    return one[0] == other[0] and all(a is None or a == b for a, b in zip(one[1:], other[1:], strict=True))


def _text(messages: Any) -> str:
    if isinstance(messages, str):
        return messages
    turns = list(messages or [])
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
