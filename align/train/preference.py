"""TRL's DPO trainer on our own token ids, with reference log-probabilities computed once by the code that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate.utils import gather_object
from torch import Tensor, cat, no_grad
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from align.core.errors import RunError
from align.core.stage import Tools
from align.train.head import score_labelled_only
from align.train.settings import DPOSettings, Speed
from align.train.trainer import OurTrainer, training_arguments

SAME = {"fp32": 1e-4, "bf16": 0.03}
"""How far, per token in nats, two computations of the same log-probability may lie apart by rounding."""

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")

PairIds = Mapping[str, Sequence[int]]
"""A pair as the trainer takes it: `prompt_ids`, `chosen_ids`, `rejected_ids`."""


def dpo_arguments(settings: DPOSettings, speed: Speed, tools: Tools) -> Any:
    """TRL's arguments for `DPO`."""
    return training_arguments(
        DPOConfig,
        settings,
        speed,
        tools,
        max_length=None,  # the rows have been measured; nothing is cut
        beta=settings.beta,
        loss_type=list(settings.losses),
        loss_weights=settings.loss_weights,
        label_smoothing=settings.label_smoothing,
        precompute_ref_log_probs=True,
    )


class DPO(OurTrainer, DPOTrainer):  # type: ignore[misc]
    """Rows are pairs of ids with `ref_chosen_logps` and `ref_rejected_logps`, which `reference_logps` gives.

    Attributes:
        starts_at_reference: whether the policy is the reference before the first step; then that is checked at it.
    """

    def __init__(self, settings: DPOSettings, tools: Tools, rows: int, **trl: Any) -> None:
        self.starts_at_reference = False
        self.nll_weight = settings.nll_weight
        super().__init__(settings, tools, rows, **trl)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RunError(
                "dpo and online-dpo run the whole model in each process before the first step: start them without FSDP "
                "and DeepSpeed (plain data parallel), and use lora_rank where memory is short"
            )

    def reference_logps(self, pairs: Sequence[PairIds], reference: Any = None) -> npt.NDArray[np.float32]:
        """Summed log-probabilities of the chosen and the rejected under the reference model, (N, 2), nats.

        Computed by the function, the collator and the head that training uses. Processes share the work.

        Args:
            pairs: their ids.
            reference: the frozen model, made ready by `score_like_the_policy`; where not given, the policy as it is
                now, without its LoRA adapters.
        """
        return self._logps(pairs, lambda inputs: self.compute_ref_log_probs(reference or self.model, inputs))

    def policy_logps(self, pairs: Sequence[PairIds]) -> npt.NDArray[np.float32]:
        """The same under the policy as it is now, (N, 2), nats."""

        def score(inputs: dict[str, Tensor]) -> Any:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with no_grad(), self.accelerator.autocast():
                out = self.model(**given, labels=labels, fused_lm_head=True)
            return out.log_probs.sum(1).chunk(2)

        return self._logps(pairs, score)

    def score_like_the_policy(self, reference: Any) -> Any:
        """Puts the trainer's head on a reference model, and the model where the trainer's is."""
        add_fused_lm_head(reference)
        if self.args.use_cpu:
            score_labelled_only(reference)
        return reference.to(self.args.device).eval().requires_grad_(False)

    def _logps(self, pairs: Sequence[PairIds], score: Callable[[Any], Any]) -> npt.NDArray[np.float32]:
        lengths = [sum(len(pair[name]) for name in _IDS) for pair in pairs]
        longest_first = np.argsort(lengths, kind="stable")[::-1]  # a lack of memory shows at once
        size = self.args.per_device_train_batch_size
        batches = [longest_first[i : i + size] for i in range(0, len(lengths), size)]
        mine: list[tuple[list[int], Any]] = []
        for batch in batches[self.args.process_index :: self.args.world_size]:
            rows = [{name: ids for name, ids in pairs[int(i)].items() if name in _IDS} for i in batch]
            logps = score(self._prepare_inputs(self.data_collator(rows)))  # chosen (B,), rejected (B,)
            mine.append((batch.tolist(), np.stack([side.float().cpu().numpy() for side in logps], axis=1)))
        found = np.empty((len(lengths), 2), np.float32)
        for numbers, values in gather_object(mine):
            found[numbers] = values
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Any:
        """TRL's loss, and the chosen's negative log-likelihood: the mean over pairs of the mean over tokens.

        The mean over pairs, unlike TRL's `sft` over the tokens of a micro batch, is the same however a global batch is
        split.
        """
        seen: list[Any] = []

        def scored(*args: Any, **kwargs: Any) -> Any:
            seen.append(model(*args, **kwargs))
            return seen[-1]

        with self.router.watching():
            loss = super()._compute_loss(scored, inputs, return_outputs)
        loss = loss + self.router.term(1.0, inputs["attention_mask"].bool())
        log_probs, mask = seen[0].log_probs, seen[0].label_mask  # (2B, T-1), chosen first
        if self.starts_at_reference and self.step == 0:
            self._check_margins(log_probs.detach().sum(1), mask.sum(1), inputs)
        if self.nll_weight:
            chosen, tokens = log_probs.chunk(2)[0].sum(1), mask.chunk(2)[0].sum(1)
            nll = -(chosen / tokens).mean()
            self._metrics["train"]["nll"].append(self.accelerator.gather(nll.detach()).mean().item())
            loss = loss + self.nll_weight * nll
        return loss

    def _check_margins(self, logps: Tensor, tokens: Tensor, inputs: dict[str, Tensor]) -> None:
        """Before the first step policy and reference are one model, so all log-ratios must be 0 up to rounding."""
        reference = cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        apart = ((logps - reference).abs() / tokens).max().item()
        if not apart <= SAME["bf16" if self.args.bf16 else "fp32"]:
            raise RunError(
                f"before the first step the policy's log-probabilities differ from the reference's by {apart:.2g} nats "
                "a token, though they are one model; the reference was computed otherwise than the policy is, so the "
                "run stops; remove the step's work folder and run it again, in fp32 if this comes back"
            )

    def chosen_change(self) -> float:
        """Mean change of the chosen's summed log-probability against the reference over the last tenth of the steps."""
        rewards = [line["rewards/chosen"] for line in self.curves.lines]
        last = rewards[-max(1, len(rewards) // 10) :]
        return sum(last) / len(last) / self.beta if last else math.nan

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows are ids already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """`reference_logps` has done it, or will, once the head is in place."""
        return dataset
