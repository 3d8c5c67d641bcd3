"""The file of an episode: every completion with its scores, what became of it, and the pairs that were trained on.

A row is a prompt; its lists have a place for each completion. The file is all that the trainer takes of an episode, so
a run can be looked over, and trained again without sampling (`align replay`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from align.train.online_settings import PARTS

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of an episode's rows as the trainer takes them, in the rows' order and a row's own order.

    Each has `prompt_ids`, `chosen_ids`, `rejected_ids`, and the reference's log-probabilities where they are known.
    """
    found = []
    for row in rows:
        for pair in row["pairs"]:
            ids = {f"{side}_ids": row["completion_ids"][pair[side]] for side in ("chosen", "rejected")}
            known = {name: pair[name] for name in _REFERENCE if pair.get(name) is not None}
            found.append({"prompt_ids": row["prompt_ids"]} | ids | known)
    return found


def set_reference(rows: Sequence[Mapping[str, Any]], logps: Any) -> None:
    """Writes the reference's log-probabilities, (N, 2), nats, into the rows' pairs, in the order of `pairs_of`."""
    every = [pair for row in rows for pair in row["pairs"]]
    for pair, both in zip(every, logps.tolist(), strict=True):
        pair.update(zip(_REFERENCE, both, strict=True))


def record_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of an episode's prompts and completions, in counts and means.

    `reward`: as pairing saw it; `scores`: of each part, as it gave them; `length` in tokens; `truncated` a share.
    """
    every = [(row, place) for row in rows for place in range(len(row["completion_ids"]))]
    rewards = [reward for row in rows for reward in row["rewards"] if reward is not None]
    lengths = [len(ids) for row in rows for ids in row["completion_ids"]]
    scores = {part: [s for row, i in every if (s := row["scores"][i].get(part)) is not None] for part in PARTS}
    return {
        "prompts": len(rows),
        "completions": len(every),
        "pairs": sum(len(row["pairs"]) for row in rows),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "became": dict(Counter(became for row in rows for became in row["became"])),
        "reward": fmean(rewards) if rewards else None,
        "scores": {part: fmean(given) for part, given in scores.items() if given},
        "length": fmean(lengths) if lengths else None,
        "truncated": fmean(row["finish_reasons"][i] == "length" for row, i in every) if every else None,
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """An episode's file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema()), part)
    part.rename(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an episode's file."""
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def _schema() -> Any:
    """The columns.

    policy_step: the step whose weights sampled it.
    sampler_logps: summed log-probability of a completion under the sampler, nats; null where it gave none.
    verdicts: of a verifier, where one spoke.
    details: what verifier and judge said of it, in words.
    scores: what each part of the scorer gave; null where it was not asked, or could not say.
    penalties: what length and a missing end cost it.
    rewards: what pairing saw, penalties taken off; null for an error.
    became: what pairing made of each completion, see `reward.pairs.fates`; not_taken where its prompt was not chosen,
        no_scorer where nobody could score it.
    scorer: the parts that scored, joined by +; outcome: paired, or why there is no pair.
    pairs: places of the chosen and the rejected, and the reference's log-probabilities of both.
    """
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    parts = [(part, pa.float64()) for part in PARTS]
    pair = [("chosen", pa.int32()), ("rejected", pa.int32()), ("margin", pa.float64())]
    return pa.schema(
        {
            "episode": pa.int32(),
            "policy_step": pa.int64(),
            "prompt_id": pa.string(),
            "family": pa.string(),
            "prompt_ids": ids,
            "completion_ids": pa.list_(ids),
            "finish_reasons": pa.list_(pa.string()),
            "sampler_logps": pa.list_(pa.float64()),
            "verdicts": pa.list_(pa.string()),
            "details": pa.list_(pa.string()),
            "scores": pa.list_(pa.struct(parts)),
            "penalties": pa.list_(pa.float64()),
            "rewards": pa.list_(pa.float64()),
            "became": pa.list_(pa.string()),
            "scorer": pa.string(),
            "outcome": pa.string(),
            "pairs": pa.list_(pa.struct([*pair, *((name, pa.float32()) for name in _REFERENCE)])),
        }
    )
