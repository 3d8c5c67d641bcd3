"""TRL's DPO trainer on our own token ids: one function scores pairs, for the reference, the policy and the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, no_grad
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from align.core.errors import RecipeError, RunError
from align.core.segments import Branch, Tree, by_branch, can_be_flat, collate, model_inputs
from align.core.stage import Tools
from align.train.head import score_labelled_only
from align.train.losses import SORTING, Pairs, terms
from align.train.reference import PairIds
from align.train.settings import DPOSettings, Speed
from align.train.trainer import OurTrainer, token_mask, training_arguments

SAME = {"fp32": 1e-4, "bf16": 0.03}
"""How far, per token in nats, two computations of the same log-probability may lie apart by rounding."""

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def dpo_arguments(settings: DPOSettings, speed: Speed, tools: Tools) -> Any:
    """TRL's arguments for `DPO`; of the loss it is told nothing, since ours is in align/train/losses.py."""
    return training_arguments(
        DPOConfig,
        settings,
        speed,
        tools,
        max_length=None,  # the rows have been measured; nothing is cut
        beta=settings.beta,
        disable_dropout=True,
        precompute_ref_log_probs=True,
    )


def collate_pairs(rows: Sequence[Mapping[str, Any]], flat: bool, pad_id: int = 0) -> dict[str, Any]:
    """B pairs as a batch: each a prompt with two branches, which in a flat batch is computed once for both.

    Args:
        rows: pairs of ids, and their `ref_chosen_logps` and `ref_rejected_logps` where these are known.
        flat: see `align.core.segments.collate`.
        pad_id: any token.

    Returns:
        What `collate` gives, its branches numbered chosen, rejected, chosen, ...; `tokens` of the completions, (B, 2);
        `read`, the tokens that the model computes, padding apart; and `reference`, (B, 2).
    """
    trees = [Tree(row["prompt_ids"], [Branch(row["chosen_ids"]), Branch(row["rejected_ids"])]) for row in rows]
    batch = collate(trees, flat, pad_id)
    batch["tokens"] = torch.tensor([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows])
    batch["read"] = torch.tensor(batch["input_ids"].numel()) if flat else batch["attention_mask"].sum()
    if "ref_chosen_logps" in rows[0]:
        batch["reference"] = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    return batch


def without_dropout(model: Any) -> None:
    """Turns every kind of dropout off: that of modules, and the attention's, which is a number in the layers.

    TRL's `disable_dropout` leaves the second kind on, so that the policy is computed otherwise than its reference.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class DPO(OurTrainer, DPOTrainer):  # type: ignore[misc]
    """Rows are pairs of ids with `ref_chosen_logps` and `ref_rejected_logps`, which `reference_logps` gives.

    Attributes:
        flat: whether batches are flat; a model that can't read such is given padded rows.
        starts_at_reference: whether the policy is the reference before the first step; then that is checked at it.
        mean_tokens: of a chosen completion, over the global batch that is under way.
        read: tokens of that batch, over one micro batch's mean share of it.
        load: what each expert gets of it, see `experts_load`.
    """

    settings: DPOSettings

    def __init__(self, settings: DPOSettings, tools: Tools, rows: int, **trl: Any) -> None:
        self.starts_at_reference = False
        self.mean_tokens, self.read = 1.0, 1.0
        self.load: Tensor | None = None
        self._seen: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        super().__init__(settings, tools, rows, **trl)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RunError(
                "dpo and online-dpo run the whole model in each process before the first step: start them without FSDP "
                "and DeepSpeed (plain data parallel), and use lora_rank where memory is short"
            )
        without_dropout(self.model)
        self.precision = "bf16" if self.args.bf16 else "fp32"
        self.flat = can_be_flat(self.model, self.precision)
        self.data_collator = self.batch
        sorting = sorted(set(settings.losses) & set(SORTING))
        if sorting and (self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1):
            raise RecipeError(
                f"losses: {', '.join(sorting)} sorts the pairs of the global batch, so it must be computed in one "
                f"piece; set micro_batch_size={settings.global_batch_size} (or a smaller global_batch_size) and "
                "processes=1"
            )

    def batch(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `collate_pairs`; in the layout that the models take."""
        return collate_pairs(pairs, self.flat, self.processing_class.pad_token_id)

    # --- log-probabilities ------------------------------------------------------------------------------------------

    def score(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Summed log-probabilities of the chosen and the rejected of B pairs, (B, 2), nats, float32."""
        out = model(**model_inputs(inputs), use_cache=False, fused_lm_head=True)
        return by_branch(out.log_probs.float(), inputs["branch"], 2 * len(inputs["tokens"])).view(-1, 2)

    def reference_logps(self, pairs: Sequence[PairIds], reference: Any = None) -> npt.NDArray[np.float32]:
        """Summed log-probabilities of the chosen and the rejected under the reference model, (N, 2), nats.

        Computed by the function, the collator and the head that training uses. Processes share the work.

        Args:
            pairs: their ids.
            reference: the frozen model, made ready by `score_like_the_policy`; where not given, the policy as it is
                now, without its LoRA adapters.
        """
        if reference is not None:
            return self._logps(pairs, reference)
        policy: Any = self.accelerator.unwrap_model(self.model)
        adapted: bool = is_peft_model(policy)
        with policy.disable_adapter() if adapted else nullcontext():
            return self._logps(pairs, self.model)

    def policy_logps(self, pairs: Sequence[PairIds]) -> npt.NDArray[np.float32]:
        """The same under the policy as it is now, (N, 2), nats."""
        return self._logps(pairs, self.model)

    def score_like_the_policy(self, reference: Any) -> Any:
        """Puts the trainer's head and attention on a reference model, and the model where the trainer's is."""
        add_fused_lm_head(reference)
        self.flat = self.flat and can_be_flat(reference, self.precision)
        score_labelled_only(reference)
        return reference.to(self.args.device).eval().requires_grad_(False)

    def _logps(self, pairs: Sequence[PairIds], model: Any) -> npt.NDArray[np.float32]:
        lengths = [sum(len(pair[name]) for name in _IDS) for pair in pairs]
        longest_first = np.argsort(lengths, kind="stable")[::-1]  # a lack of memory shows at once
        size = self.args.per_device_train_batch_size
        batches = [longest_first[i : i + size] for i in range(0, len(lengths), size)]
        mine: list[tuple[list[int], Any]] = []
        training = model.training
        model.eval()
        for batch in batches[self.args.process_index :: self.args.world_size]:
            rows = [{name: ids for name, ids in pairs[int(i)].items() if name in _IDS} for i in batch]
            with no_grad(), self.accelerator.autocast():
                logps = self.score(model, self._prepare_inputs(self.batch(rows)))
            mine.append((batch.tolist(), logps.cpu().numpy()))
        model.train(training)
        found = np.empty((len(lengths), 2), np.float32)
        for numbers, values in gather_object(mine):
            found[numbers] = values
        return found

    # --- one step ---------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro batches of the next optimizer step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.look_over(batches)
        return batches, None

    def look_over(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Counts, over all processes, what the loss of a micro batch must know of its global batch."""
        mine = [[batch["tokens"][:, 0].float().mean(), batch["read"].float()] for batch in batches]
        means = torch.tensor(mine, device=self.args.device).mean(0)
        self.mean_tokens, self.read = self.accelerator.reduce(means, "mean").tolist()
        self.load = self.experts_load(self.model, [self._prepare_inputs(dict(batch)) for batch in batches])

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        """The weighted sum of the losses, each a mean over these pairs."""
        with self.router.watching():
            logps = self.score(model, inputs)
        reference, tokens = inputs["reference"].float(), inputs["tokens"].float()
        pairs = Pairs(
            chosen=logps[:, 0],
            rejected=logps[:, 1],
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            mean_tokens=self.mean_tokens,
        )
        if self.at_reference():
            self._check_margins(logps.detach(), reference, tokens)
        found = terms(pairs, self.settings)
        loss = torch.stack([weight * value for weight, value in found.values()]).sum()
        if self.router.weight:
            loss = loss + self.router.term(float(inputs["read"]) / self.read, token_mask(inputs), self.load)
        with no_grad():
            figures = self._figures(pairs)
            if len(found) > 1:
                figures |= {name if name == "nll" else f"loss/{name}": value for name, (_, value) in found.items()}
            self._names = tuple(figures)
            self._seen.append(torch.stack(list(figures.values())).detach())
        return (loss, None) if return_outputs else loss

    def _figures(self, pairs: Pairs) -> dict[str, Tensor]:
        """Means over the pairs. Accuracy says nothing about health: the chosen may fall while the margin grows.

        `kl` is the mean fall of a completion's log-probability: an estimate of the divergence KL(reference || policy)
        where the pairs are the reference's own samples.
        """
        mean = pairs.per_token()
        seen = mean if self.settings.length_normalised else pairs
        margins = self.settings.beta * (seen.c - seen.r)
        each = {
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen_change": pairs.c,
            "logps/rejected_change": pairs.r,
            "kl": -(pairs.c + pairs.r) / 2,
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
            "length/chosen": pairs.chosen_tokens,
            "length/rejected": pairs.rejected_tokens,
            "logps/chosen_per_token": mean.chosen,
            "logps/rejected_per_token": mean.rejected,
            "rewards/chosen": self.settings.beta * seen.c,
            "rewards/rejected": self.settings.beta * seen.r,
        }
        return {name: values.mean() for name, values in each.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures of the step: means over its micro batches and over all processes."""
        if self._seen and "loss" in logs:
            figures = self.accelerator.reduce(torch.stack(self._seen).mean(0), "mean").tolist()
            logs |= dict(zip(self._names, figures, strict=True))
            self.figures = {"tokens": round(self.read * len(self._seen) * self.args.world_size)}
        self._seen.clear()
        super().log(logs, start_time)

    def at_reference(self) -> bool:
        """Whether the policy is the reference before this step."""
        return self.starts_at_reference and self.step == 0

    def _check_margins(self, logps: Tensor, reference: Tensor, tokens: Tensor) -> None:
        """Where policy and reference are one model all log-ratios must be 0 up to rounding."""
        apart = ((logps - reference).abs() / tokens).max().item()
        if not apart <= SAME[self.precision]:
            kept = (self.tools.cache or self.tools.work) / "reference"
            raise RunError(
                f"before the first step the policy's log-probabilities differ from the reference's by {apart:.2g} nats "
                "a token, though they are one model; the reference was computed otherwise than the policy is, so the "
                f"run stops; remove {self.tools.work} and {kept}, and run it again, in fp32 if this comes back"
            )

    def chosen_change(self, upto: float = math.inf) -> float:
        """Mean change of the chosen's summed log-probability against the reference over the last tenth of the steps.

        Args:
            upto: the last step that counts.
        """
        lines = [line for line in self.curves.lines if line["step"] <= upto]
        changes = [line["logps/chosen_change"] for line in lines if "logps/chosen_change" in line]
        last = changes[-max(1, len(changes) // 10) :]
        return sum(last) / len(last) if last else math.nan

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows are ids already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """`reference_logps` has done it, or will, once the head is in place."""
        return dataset
