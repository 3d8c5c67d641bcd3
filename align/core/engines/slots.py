"""The slot loop: rows that finish give their slot to the next prompt, so that every step runs as full as it can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from align.core.engines.base import Completion, SamplingParams
from align.core.engines.decoder import Decoder
from align.core.engines.draws import choose, logprobs_of, sample_key, uniforms
from align.core.engines.shaping import Shaping
from align.core.engines.structured import Form

_Number = TypeVar("_Number", np.int64, np.float32)

PREFILL_TOKENS = 8192
"""Most prompt tokens, padding included, that one prefill computes."""


@dataclass(frozen=True, slots=True)
class Job:
    """Samples `indices` of one prompt; at most as many as there are slots.

    Attributes:
        number: the prompt's number in the call.
        ids: the prompt's token ids.
        indices: sample indices.
        error: why the prompt can't be sampled from; then `ids` isn't used.
    """

    number: int
    ids: list[int]
    indices: range
    error: str = ""


class Endings:
    """Where a completion ends: end tokens, and stop texts, which are looked for only after tokens that can end one."""

    def __init__(self, tokenizer: Any, end_ids: Iterable[int], stop: tuple[str, ...], vocabulary: int) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.get_added_vocab()
        ends = {*end_ids, *(special[text] for text in stop if text in special)}
        self.is_end = np.zeros(vocabulary, dtype=bool)
        self.is_end[[i for i in ends if i < vocabulary]] = True
        self.stop = tuple(text for text in stop if text and text not in special)
        self.can_stop = np.zeros(vocabulary, dtype=bool)
        if self.stop:
            last = {text[-1] for text in self.stop}
            pieces = self.texts([[i] for i in range(min(vocabulary, len(tokenizer)))])
            for i, piece in enumerate(pieces):
                # A part of a character decodes to U+FFFD; a leading space may be lost when a token is decoded alone.
                self.can_stop[i] = "\ufffd" in piece or " " in last or not last.isdisjoint(piece)

    def texts(self, rows: list[list[int]]) -> list[str]:
        """Decodes token ids without special tokens."""
        decoded: list[str] = self.tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded

    def cut(self, ids: list[int]) -> str | None:
        """The text before the first stop text; None where there is none."""
        text = self.texts([ids])[0]
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return text[: min(found)] if found else None


class SlotLoop:
    """One call of `sample`: takes jobs as slots become free, yields completions as they finish."""

    def __init__(
        self,
        decoder: Decoder,
        jobs: Iterator[Job],
        slots: int,
        endings: Endings,
        params: SamplingParams,
        device: Any,
        form: Form | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.decoder, self.jobs, self.slots = decoder, jobs, slots
        self.shaping = Shaping(params, form, slots, device)
        self.endings, self.params, self.device = endings, params, torch.device(device)
        self.autocast = autocast  # products in this precision; None: as the weights are
        self.next: Job | None = None
        self.need = 0  # most tokens, prompt and new ones, of any row since there were none
        # The decoder's rows change places; what belongs to a sample stays in its slot.
        self.slot_of: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # by row
        self.free = list(range(slots))[::-1]
        self.owners = [(0, 0)] * slots  # (prompt number, sample index)
        self.prompts: list[list[int]] = [[]] * slots
        self.keys = np.zeros(slots, dtype=np.uint64)
        self.counts = np.zeros(slots, dtype=np.int64)  # tokens sampled so far
        width = min(params.max_tokens, 256)
        self.sampled: NDArray[np.int64] = np.zeros((slots, width), dtype=np.int64)
        self.logprobs: NDArray[np.float32] = np.zeros((slots, width), dtype=np.float32)
        self.last = torch.zeros(0, dtype=torch.long, device=device)  # by row: the token that the next step feeds

    def run(self) -> Iterator[tuple[int, int, Completion]]:
        """Yields `(prompt number, sample index, completion)` until the jobs are used up."""
        for finished in self.steps():
            yield from finished

    def steps(self) -> Iterator[list[tuple[int, int, Completion]]]:
        """Yields what has finished after each step, as a rule nothing."""
        self._advance()
        while True:
            while self.next is not None and self.next.error:
                failed = Completion("", (), "error", error=self.next.error)
                yield [(self.next.number, index, failed) for index in self.next.indices]
                self._advance()
            batch = self._batch()
            first = len(self.slot_of)
            if batch:
                with self._computing():
                    logits = self.decoder.admit([job.ids for job in batch], [len(job.indices) for job in batch])
                    repeats = torch.tensor([len(job.indices) for job in batch], device=logits.device)
                    logits = logits.repeat_interleave(repeats, 0)
                self._seat(batch)
            elif first:
                first = 0
                with self._computing():
                    logits = self.decoder.step(self.last)
            else:
                return
            yield self._take(first, logits)

    def sampled_of_first(self) -> list[int]:
        """The tokens so far of the first row that is still being sampled."""
        return self._ids(int(self.slot_of[0]))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            yield

    def _advance(self) -> None:
        self.next = next(self.jobs, None)

    def _batch(self) -> list[Job]:
        """The jobs to admit now: none until a quarter of the slots is free, then as many as fit."""
        rows = len(self.slot_of)
        if rows and (not self.decoder.refills or self.slots - rows < self.slots // 4):
            return []
        batch: list[Job] = []
        longest = 0
        need = self.need if rows else 0
        while (job := self.next) is not None and not job.error and rows + len(job.indices) <= self.slots:
            longest = max(longest, len(job.ids))
            need = max(need, len(job.ids) + self.params.max_tokens)
            if rows and not self.decoder.fits(rows + len(job.indices), need):
                break
            if batch and longest * (len(batch) + 1) > PREFILL_TOKENS:
                break
            if batch and not self.decoder.pads and len(job.ids) != len(batch[0].ids):
                break
            batch.append(job)
            rows += len(job.indices)
            self.need = need
            self._advance()
        return batch

    def _seat(self, batch: list[Job]) -> None:
        """Gives each sample of the admitted jobs a slot."""
        seats: list[int] = []
        for job in batch:
            for index in job.indices:
                slot = self.free.pop()
                self.keys[slot] = sample_key(self.params.seed, job.ids, index)
                self.counts[slot] = 0
                self.owners[slot] = (job.number, index)
                self.prompts[slot] = job.ids
                self.shaping.begin(slot, job.ids)
                seats.append(slot)
        self.slot_of = np.append(self.slot_of, seats)
        self.last = F.pad(self.last, (0, len(seats)))

    def _take(self, first: int, logits: torch.Tensor) -> list[tuple[int, int, Completion]]:
        """Samples a token for rows from `first` on; the completions that it finishes leave their slots."""
        slots = self.slot_of[first:]
        counts = self.counts[slots]
        if counts.max() >= self.sampled.shape[1]:
            self.sampled = _wider(self.sampled)
            self.logprobs = _wider(self.logprobs)
        with torch.no_grad():
            u = torch.from_numpy(uniforms(self.keys[slots], counts)).to(logits.device)
            token, usable, close = choose(self.shaping.shaped(slots, logits), u, self.params)
            for at in torch.nonzero(close & usable)[:, 0].tolist():
                slot = slots[at : at + 1]
                with self._computing():
                    logits[at] = self.decoder.alone(self.prompts[slot[0]] + self._ids(slot[0]))
                token[at] = choose(self.shaping.shaped(slot, logits[at : at + 1]), u[at : at + 1], self.params)[0]
            self.last[first:] = token
            self.shaping.accept(slots, token)
            if self.params.logprobs:
                self.logprobs[slots, counts] = logprobs_of(logits, token).cpu().numpy()
        token_ids = token.cpu().numpy()
        self.sampled[slots, counts] = token_ids
        self.counts[slots] += 1
        unusable = ~usable.cpu().numpy() | np.array([bool(self.shaping.problems[slot]) for slot in slots])
        ended = self.endings.is_end[token_ids] & ~unusable
        done = ended | unusable | (counts + 1 >= self.params.max_tokens)
        cuts: dict[int, str] = {}
        if self.endings.stop:
            for at in np.flatnonzero(self.endings.can_stop[token_ids] & ~ended & ~unusable).tolist():
                text = self.endings.cut(self._ids(slots[at]))
                if text is not None:
                    cuts[int(slots[at])] = text
                    done[at] = True
        if not done.any():
            return []
        results = self._results(slots[done].tolist(), ended[done], unusable[done], cuts)
        self.free += slots[done].tolist()
        order = self.decoder.drop((first + np.flatnonzero(done)).tolist())
        self.slot_of, self.last = self.slot_of[order], self.last[order]
        return results

    def _ids(self, slot: int) -> list[int]:
        ids: list[int] = self.sampled[slot, : self.counts[slot]].tolist()
        return ids

    def _results(
        self, slots: list[int], ended: NDArray[np.bool_], unusable: NDArray[np.bool_], cuts: dict[int, str]
    ) -> list[tuple[int, int, Completion]]:
        """The finished completions in these slots; `cuts` holds the texts of those that a stop text ended."""
        ids = [self._ids(slot) for slot in slots]
        texts = self.endings.texts([i[:-1] if end else i for i, end in zip(ids, ended, strict=True)])
        out: list[tuple[int, int, Completion]] = []
        for slot, tokens, text, end, bad in zip(slots, ids, texts, ended, unusable, strict=True):
            if bad:
                reason = self.shaping.problems[slot] or "the model's logits are not numbers (NaN)"
                reason = f"new token {len(tokens)}: {reason}"
                completion = Completion("", (), "error", error=reason)
            else:
                logprobs = tuple(self.logprobs[slot, : len(tokens)].tolist()) if self.params.logprobs else None
                stopped = bool(end) or slot in cuts
                completion = Completion(cuts.get(slot, text), tuple(tokens), "stop" if stopped else "length", logprobs)
            out.append((*self.owners[slot], completion))
        return out


def _wider(array: NDArray[_Number]) -> NDArray[_Number]:
    """The array with twice as many columns."""
    out = np.zeros((array.shape[0], 2 * array.shape[1]), dtype=array.dtype)
    out[:, : array.shape[1]] = array
    return out
