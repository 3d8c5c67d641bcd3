"""The reference's log-probabilities, kept by content: computed once, and used by every run in which they are the same.

A run that changes the learning rate, beta, the loss, the batch or the epochs finds them all; one with more pairs
computes the new ones. What changes a figure is in the key of a folder (`setup_of`), and a pair is known by its token
ids; so another template, another cut or another model never finds what isn't its own, and no setting has to be
remembered here.

On disk: `CACHE/reference/KEY/`, one file for each stretch of pairs that was computed, named by the hash of what is in
it, and `setup.json`, which says in words what the key stands for. A file is there whole or not at all. The folder may
be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from align.core.errors import RunError
from align.core.fingerprint import fingerprint_of
from align.core.stage import Tools

CODE = 1
"""Raised when our code would give other log-probabilities for the same ids and weights."""

STRETCH = 4096
"""Pairs that are computed and then kept, so that a kill costs no more than these."""

PairIds = Mapping[str, Sequence[int]]
"""A pair as the trainer takes it: `prompt_ids`, `chosen_ids`, `rejected_ids`."""

_RECORD = np.dtype([("pair", "V16"), ("logps", "<f4", (2,))])

# Of a model's configuration: what names it, or changes what it generates, and none of its log-probabilities.
_IDLE = {
    "_name_or_path", "transformers_version", "architectures", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "dtype", "torch_dtype",
}  # fmt: skip


def setup_of(model: Any, precision: str, device: str) -> dict[str, Any]:
    """Everything about a model and a machine that changes a log-probability, and if only by rounding.

    Args:
        model: the reference, before a trainer has put its hands on it; without adapters.
        precision: of the computation.
        device: `cpu` or `cuda`; of a GPU its name counts.
    """
    import torch

    config = {name: value for name, value in model.config.to_dict().items() if name not in _IDLE}
    return {
        "weights": weights_digest(model),
        "config": config,
        "attention": str(model.config._attn_implementation),
        "precision": precision,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "code": CODE,
    }


def weights_digest(model: Any) -> str:
    """A hash of a model's weights as they are in memory: names, types, shapes, bytes."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pair_digest(pair: PairIds) -> bytes:
    """What a pair is known by, 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = np.asarray(pair[name], np.int64)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.digest()


class LogpCache:
    """The log-probabilities that are known under one setup.

    Args:
        folder: of all setups.
        setup: see `setup_of`, and how rows lie in a batch.
        say: is told about damaged files.
    """

    def __init__(self, folder: Path, setup: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.key = fingerprint_of(setup)
        self.folder, self.setup, self.say = folder / self.key, setup, say

    def find(self, digests: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """Of each pair the chosen's and the rejected's log-probability, (N, 2), nats; NaN where it isn't known."""
        known: dict[bytes, npt.NDArray[np.float32]] = {}
        for file in sorted(self.folder.glob("*.logps")):
            content = file.read_bytes()
            if _name(content) != file.name:
                self.say(f"{file}: is damaged; its log-probabilities are computed again")
                file.unlink()
                continue
            records = np.frombuffer(content, _RECORD)
            known |= zip((pair.tobytes() for pair in records["pair"]), records["logps"], strict=True)
        nothing = np.full(2, np.nan, np.float32)
        return np.array([known.get(digest, nothing) for digest in digests], np.float32).reshape(-1, 2)

    def add(self, digests: Sequence[bytes], logps: npt.NDArray[np.float32]) -> None:
        """Keeps what was computed."""
        records = np.empty(len(digests), _RECORD)
        records["pair"], records["logps"] = np.array(digests, "V16"), logps
        content = records.tobytes()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _put(self.folder / "setup.json", json.dumps(self.setup, indent=2).encode())
            _put(self.folder / _name(content), content)
        except OSError as problem:  # what can't be kept is computed again another time
            self.say(f"{self.folder}: can't be written ({problem.strerror}); log-probabilities are not kept there")

    def size(self) -> int:
        """Bytes on disk, all setups together."""
        return sum(file.stat().st_size for file in self.folder.parent.rglob("*.logps"))


def _put(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whoever else writes the same one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def _name(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest() + ".logps"


def cached_logps(
    cache: LogpCache,
    pairs: Any,
    compute: Callable[[Any], npt.NDArray[np.float32]],
    main: bool,
    agree: Callable[[Any], Any],
) -> tuple[npt.NDArray[np.float32], dict[str, int]]:
    """The log-probabilities of all pairs, (N, 2), from the cache where it has them; and how many came from where.

    Args:
        cache: of the reference.
        pairs: a `datasets.Dataset` of ids.
        compute: gives the log-probabilities of some of them; every process calls it.
        main: whether this process reads and writes the cache.
        agree: gives every process what the main one has.

    Raises:
        RunError: a log-probability is no finite number.
    """
    digests = [pair_digest(pair) for pair in pairs]
    found: npt.NDArray[np.float32] = agree(cache.find(digests) if main else None)
    missing = np.flatnonzero(np.isnan(found[:, 0]))
    for start in range(0, len(missing), STRETCH):
        numbers = missing[start : start + STRETCH]
        found[numbers] = compute(pairs.select(numbers))
        ruined = numbers[~np.isfinite(found[numbers]).all(1)]
        if len(ruined):
            raise RunError(
                f"the reference gives pair {ruined[0]} no finite log-probability ({found[ruined[0]].tolist()}); its "
                "weights are damaged, or bf16 is too coarse for it: try precision fp32"
            )
        if main:
            cache.add([digests[number] for number in numbers], found[numbers])
    return found, {"computed": len(missing), "from_cache": len(digests) - len(missing)}


def reference_logps(
    dpo: Any, pairs: Any, frozen: Any, setup: Mapping[str, Any], tools: Tools
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """The reference's log-probabilities of all pairs, (N, 2), nats; and for the summary where they are from.

    They are kept in the work folder too: a killed run goes on from the very same ones, whatever became of the cache.

    Args:
        dpo: the trainer, which computes those that are missing.
        pairs: a `datasets.Dataset` of ids.
        frozen: the reference, ready to score; None where the policy holds it in itself.
        setup: of the reference, see `setup_of`.
        tools: `cache`, and `work` where there is none.
    """
    from accelerate.utils import broadcast_object_list

    def agree(thing: Any) -> Any:
        return broadcast_object_list([thing])[0]

    main = dpo.accelerator.is_main_process
    setup = {**setup, "layout": "flat" if dpo.flat else "padded"}
    cache = LogpCache((tools.cache or tools.work) / "reference", setup, tools.progress.say)
    kept = tools.work / f"reference-{cache.key}.npy"
    known = agree(np.load(kept) if main and kept.exists() else None)
    if known is not None:
        return known, {"reference_logps": {"computed": 0, "from_cache": len(known)}}
    logps, counts = cached_logps(cache, pairs, lambda some: dpo.reference_logps(some, frozen), main, agree)
    if main:
        part = kept.with_suffix(".part.npy")
        np.save(part, logps)
        part.replace(kept)
    tools.progress.say(
        f"reference: {counts['computed']} pairs computed, {counts['from_cache']} found in {cache.folder.parent} "
        f"({cache.size() / 1e6:.1f} MB)"
    )
    return logps, {"reference_logps": counts}


def with_reference(pairs: Any, logps: npt.NDArray[np.float32]) -> Any:
    """The pairs with their reference log-probabilities, as the trainer takes them."""
    columns = pairs.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])
    return columns.select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
    )
