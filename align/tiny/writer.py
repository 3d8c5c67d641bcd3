"""The second model of the embedded world, `tiny-writer`: `tiny` taught what synthesis asks of a capable model.

It answers the world's instructions, and does the chores of `align/tiny/chores`: it evolves instructions, writes
checkers and tests, puts instructions to passages, judges. A third of what it reads are right answers to the world's
instructions, the others are chores; only the answers count in the loss.

    python -m align.tiny.writer out=FOLDER [chores=follow,evolve] [steps=6500] [seed=0] [start=FOLDER] [peak=3e-3]
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from align.core.errors import DataError
from align.core.store import TINY
from align.tiny.chores import Chore, load_chores
from align.tiny.world import MAKERS

TOKENS = 2048
"""Of a batch, padding among them."""

CHORES = 0.65
"""Share of chores among what is read; the others are the world's own instructions."""

_POOL = 256
"""Documents that are sorted by length before they are cut into batches."""

_SHARES = {"math": 3, "code": 2, "format": 3, "tag": 2, "benign": 1, "harmful": 1}
_FAMILIES = tuple(family for family, share in _SHARES.items() for _ in range(share))


def documents(seed: int, chores: Mapping[str, Chore]) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Yields conversations and their answers without end, the world's own and chores in turn."""
    rng = random.Random(f"writer/{seed}")
    makers = list(chores.values())
    while True:
        if makers and rng.random() < CHORES:
            messages, answer = rng.choice(makers)(rng)
            yield [dict(message) for message in messages], answer
        else:
            item = MAKERS[rng.choice(_FAMILIES)](rng, rng.random() < 0.3)
            if item.split == "train":
                yield [{"role": "user", "content": item.instruction}], item.answer


def batches(
    tokenizer: Any, seed: int, chores: Mapping[str, Chore], longest: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields token ids and labels, (B, L) each; -100 where nothing is learnt."""
    stream = documents(seed, chores)
    order = random.Random(seed)
    while True:
        pool = []
        for messages, answer in islice(stream, _POOL):
            given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            head = tokenizer(given, add_special_tokens=False)["input_ids"]
            tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(head) + len(tail) > longest:
                raise DataError(f"a chore of {len(head) + len(tail)} tokens, at most {longest} fit: {given!r:.300}")
            pool.append((head + tail, [-100] * len(head) + tail))
        pool.sort(key=lambda pair: len(pair[0]))
        ready = []
        while pool:
            count = max(1, TOKENS // len(pool[-1][0]))
            taken, pool = pool[-count:], pool[:-count]
            width = len(taken[-1][0])
            ids = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in taken]
            labels = [labels + [-100] * (width - len(labels)) for _, labels in taken]
            ready.append((torch.tensor(ids), torch.tensor(labels)))
        order.shuffle(ready)
        yield from ready


def train(model: Any, tokenizer: Any, chores: Mapping[str, Chore], steps: int, seed: int, peak: float) -> float:
    """Trains in place with AdamW and a cosine schedule; gives the mean loss of the last 50 steps.

    AdamW and not Muon, which made the base: at this size Muon's own step takes longer than the batch.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0, betas=(0.9, 0.95))
    losses: list[float] = []
    began = time.monotonic()
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, seed, chores, 512), steps)):
        share = min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = peak * share
        # causal attention: padding stands to the right and is seen by no token that counts
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {losses[-1]:.3f}  {time.monotonic() - began:5.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def make(out: str, chores: str = "", steps: int = 6500, seed: int = 0, start: str = "tiny", peak: float = 3e-3) -> Path:
    """Makes the writer and writes it to `out`, in bfloat16.

    Args:
        out: the folder.
        chores: modules of `align/tiny/chores`, with commas between; all by default.
        steps: of about 2,000 tokens each.
        seed: the same seed gives the same model on the same kind of machine.
        start: an earlier writer to go on from; `made.json` tells of it too.
        peak: the highest learning rate.

    Raises:
        DataError: `out` holds a model already.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(out)
    if (folder / "config.json").exists():
        raise DataError(f"{folder}: holds a model already; give another folder, or remove it")
    torch.manual_seed(seed)
    beginning = TINY if start == "tiny" else Path(start)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(beginning, dtype=torch.float32)
    loaded = load_chores(*filter(None, chores.split(",")))
    loss = train(model, tokenizer, loaded, steps, seed, peak)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {
        "made_by": "python -m align.tiny.writer",
        "from": "tiny" if start == "tiny" else json.loads((beginning / "made.json").read_text()),
        "chores": sorted(loaded),
        "steps": steps,
        "seed": seed,
        "peak": peak,
        "final_loss": round(loss, 4),
    }
    (folder / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    given: dict[str, Any] = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for key, kind in (("steps", int), ("seed", int), ("peak", float)):
        given |= {key: kind(given[key])} if key in given else {}
    print(make(**given))
