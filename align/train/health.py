"""What a DPO run does beside its loss: the chosen's log-probability, and the verified score on held-out prompts.

Under DPO the probability of the chosen may fall with that of the rejected, as long as the margin grows (likelihood
displacement, arXiv:2410.08847): what both lose goes to completions that nobody has seen. Pair accuracy stays high all
the while. So the chosen's change is watched, and prompts with a right answer are answered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from align.core.engines.transformers_engine import TransformersEngine
from align.core.errors import DataError
from align.core.records import Row
from align.train.online_settings import Config as Probing
from align.train.preference import DPO
from align.train.probe import Probe, look
from align.train.scoring import Scorer
from reward.verifiers import Verifiers

LATELY = 5
"""Steps over which the chosen's change is averaged: batches differ."""

KEPT = 20
"""How often in a run good weights are kept, where it may be stopped."""


class Displacement(TrainerCallback):  # type: ignore[misc]
    """Warns when the chosen have lost log-probability, and stops the run where that is asked for.

    Args:
        dpo: the trainer.
        warn_at: nats that the chosen may lose against the reference before it is said.
        stop_at: before the run stops and takes back the last weights that were within it; None: never.

    Attributes:
        stopped_at: the step, where it was stopped.
        kept_step: of the weights that were taken back.
    """

    def __init__(self, dpo: DPO, warn_at: float, stop_at: float | None) -> None:
        self.dpo, self.warn_at, self.stop_at = dpo, warn_at, stop_at
        self.warned = False
        self.stopped_at: int | None = None
        self.kept_step = 0
        self.file = dpo.tools.work / "good.pt"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights at the start are good."""
        if self.stop_at is not None and state.global_step == 0:
            self._keep(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Looks at the last steps."""
        if "logps/chosen_change" not in logs:
            return
        every = [line["logps/chosen_change"] for line in state.log_history if "logps/chosen_change" in line]
        change = sum(every[-LATELY:]) / len(every[-LATELY:])
        if change < -self.warn_at and not self.warned:
            self.warned = True
            self.dpo.tools.progress.say(f"warning: step {state.global_step}: {displaced(change)}")
        if self.stop_at is None:
            return
        if not change >= -self.stop_at:
            self.stopped_at, control.should_training_stop = state.global_step, True
        elif state.global_step % self._apart(state.max_steps) == 0:
            self._keep(state.global_step)

    def _apart(self, steps: int) -> int:
        """Steps between two keepings: a multiple of those between two merges, after which alone weights are whole."""
        every = self.dpo.settings.merging_every
        return max(1, math.ceil(steps / KEPT / every)) * every

    def _keep(self, step: int) -> None:
        accelerator = self.dpo.accelerator
        if accelerator.is_main_process:
            weights = {name: p.detach() for name, p in trained(self.dpo)}
            part = Path(f"{self.file}.part")
            torch.save({"step": step, "weights": weights}, part)
            part.replace(self.file)
        accelerator.wait_for_everyone()

    def take_back(self) -> str | None:
        """Puts the last good weights back where the run was stopped, and gives what a person should know."""
        if self.stopped_at is None:
            return None
        good = torch.load(self.file, weights_only=True, map_location="cpu")
        self.kept_step = good["step"]
        with torch.no_grad():
            for name, parameter in trained(self.dpo):
                parameter.copy_(good["weights"][name])
        of = "the start" if self.kept_step == 0 else f"step {self.kept_step}"
        return (
            f"stopped at step {self.stopped_at}: the chosen completions lost more than stop_at_chosen_drop "
            f"({self.stop_at:g} nats); the weights of {of} are kept; raise nll_weight or beta, or lower learning_rate"
        )


def trained(dpo: DPO) -> list[tuple[str, Any]]:
    """The parameters that are trained, by name."""
    model = dpo.accelerator.unwrap_model(dpo.model)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def displaced(change: float) -> str:
    """What the chosen lost, and what helps."""
    return (
        f"the chosen completions lost {-change:.1f} nats of log-probability (likelihood displacement); "
        "raise nll_weight or beta, or lower learning_rate"
    )


def held_out_rows(prompts: Any, most: int, seed: int) -> list[Row]:
    """Which prompts are answered on the way: some of the dev split that a program can verify; none without prompts.

    Raises:
        DataError: there are none such.
    """
    if prompts is None:
        return []
    rows = [row for row in prompts.rows() if row["split"] == "dev" and Scorer.decidable(row)]
    if not rows:
        raise DataError(
            f"{prompts.name}: no prompt of the dev split that has a task and a reference to verify answers by; give "
            "such prompts, or leave the input `prompts` out"
        )
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))[:most]]


@contextmanager
def held_out(dpo: DPO, rows: Sequence[Row], reference: Any, max_tokens: int, every: float) -> Iterator[None]:
    """Has a training answer held-out prompts: before the first step, after each share `every`, after the last.

    Args:
        dpo: the trainer.
        rows: see `held_out_rows`; none: nothing happens.
        reference: the frozen model, ready to score; None where the policy holds it in itself.
        max_tokens: of an answer.
        every: share of the steps between two looks.
    """
    if not rows:
        yield
        return
    probing = Probing.model_validate({"scorer": "verifier", "max_tokens": max_tokens})
    with Verifiers(say=dpo.tools.progress.say) as verifiers:
        scorer = Scorer(probing, verifiers, None, dpo.processing_class)
        dpo.add_callback(
            HeldOut(dpo, lambda engine, seed: look(engine, dpo, reference, rows, scorer, probing, seed), every)
        )
        yield


class HeldOut(TrainerCallback):  # type: ignore[misc]
    """See `held_out`.

    Args:
        dpo: the trainer.
        probe: answers and verifies, given the sampler and a seed.
        every: share of the steps between two looks.
    """

    def __init__(self, dpo: DPO, probe: Callable[[Any, int], Probe], every: float) -> None:
        self.dpo, self.probe, self.every = dpo, probe, every
        self.engine = TransformersEngine(dpo.model, dpo.processing_class, fingerprint="live")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The start's score, if this is the start."""
        if state.global_step == 0:
            self._look()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Whether a share of the steps has passed with this one."""
        step, steps = state.global_step, state.max_steps
        shares = [math.floor(number / steps / self.every + 1e-9) for number in (step - 1, step)]
        if "loss" in logs and (shares[0] != shares[1] or step == steps):
            self._look()

    def _look(self) -> None:
        dpo = self.dpo
        training = dpo.model.training
        dpo.model.eval()
        try:
            probe = self.probe(self.engine, dpo.tools.seed)
        finally:
            dpo.model.train(training)
        if dpo.accelerator.is_main_process:
            dpo.curves.write(dpo.place() | probe.figures())
            score = "" if probe.score is None else f"held-out score {probe.score:.1f}, "
            dpo.tools.progress.say(f"step {dpo.step}: {score}length {probe.length:.0f}, KL {probe.kl:.2f}")
        dpo.curves.since = time.monotonic()  # its tokens a second are those of training alone
