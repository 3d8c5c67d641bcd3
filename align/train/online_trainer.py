"""The DPO trainer with an episode buffer: when it is empty, the policy is sampled from and its pairs are trained on.

One optimizer and one schedule over all episodes. What is behind is on disk (align/train/border.py): each completion as
it comes, each episode's rows, weights and optimizer at every border between two episodes and every `save_every` steps
in one. A killed run goes on from there, and an episode that a guard objects to is undone with it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object

from align.core.stage import Tools
from align.train.border import Borders, load_weights
from align.train.data import batch_order
from align.train.episode_file import pairs_of, read_rows, record_of, set_reference, write_rows
from align.train.guards import end_of_run, objections
from align.train.online_settings import Config
from align.train.preference import DPO
from align.train.probe import Probe, check_gap, look
from align.train.samplers import Live, Sampler
from align.train.scoring import Scorer
from align.train.settings import Speed
from align.train.share import Share
from align.train.stale import Ahead
from align.train.trainer import learning_rate_factor


class OnlineDPO(DPO):
    """Pairs come from the policy itself, an episode at a time; sampled ids are trained as they are.

    Not generated inside the DataLoader: that reads one batch ahead, which would be of the policy before.

    Args:
        share: this process's part of the sampling; None where nothing is sampled (align/train/replay.py).
        reference: the frozen model; None where the policy holds it in itself, or nobody asks it.
        sampler: another engine than the live model.

    Attributes:
        episode: how many are behind.
        records: what became of each, for the summary.
        kept: probes of the start and of every episode that stayed.
        second: scores held-out answers by what nothing is trained on; see `guards.second_scorer`.
        ahead: the second process, where samples are one episode stale.
    """

    settings: Config
    announces = False  # each episode says how many steps it has

    def __init__(
        self,
        settings: Config,
        tools: Tools,
        share: Share | None,
        reference: Any,
        sampler: Sampler | None = None,
        **trl: Any,
    ) -> None:
        self.episode, self.steps_before, self.steps_here = 0, 0, 1
        self.records: list[dict[str, Any]] = []
        self.kept: list[Probe] = []
        self.queue: list[list[Mapping[str, Any]]] | None = None  # global batches; None between two episodes
        super().__init__(settings, tools, rows=1, **trl)
        self.share: Any = share
        self.second: Scorer | None = None
        self.ahead: Ahead | None = None
        self.reference = None if reference is None else self.score_like_the_policy(reference)
        self.engine: Any = sampler
        if sampler is None and share is not None:
            self.engine = Live(self.model, self.processing_class, self.precision)
        self.save_every = Speed.of(tools.speed).save_every
        self.borders = Borders(tools.work / "border")
        self.began_at = 0  # step at which the episode began
        self.weights_at = 0  # step after which the weights were what they were then; earlier after a roll-back
        self.lines_before = 0
        self.begun = False
        if (border := self.borders.read()) is not None:
            self._read_border(border)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The micro batches of the next optimizer step; between two episodes, what makes the next one."""
        if not self.begun:
            self._begin()
        if self.ahead is not None:
            self.ahead.listen()
        while not self.queue:
            if self.queue is not None:
                self._close_episode()
            stopped = bool(self.records) and bool(self.records[-1]["stopped"])
            if stopped or self.episode == self.settings.episodes:
                self.control.should_training_stop = True
                return [], None
            self._open_episode()
        if self.step > self.began_at and self.step % self.save_every == 0:
            self._keep_state()
        rows = self.queue.pop(0)
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        mine = [rows[(i * world + self.args.process_index) * size :][:size] for i in range(num_batches)]
        batches = [self.batch(micro) for micro in mine]
        self.look_over(batches)
        return batches, None

    def _begin(self) -> None:
        """The start's probe and the first border; or, after a kill, the newest state."""
        self.begun = True
        if self.borders.read() is None:
            if self.ahead is not None:
                self.ahead.begin()  # it has much to load, while this one looks
            self._look_at_start()
            self._keep_state()
            self._write_border()
            return
        self._restore(self.steps_before if self.steps_before > self.began_at else self.weights_at)
        if self.accelerator.is_main_process and self.share is not None:  # the step's folder was emptied
            for number in range(self.episode):
                self._publish(number)

    # --- one episode ------------------------------------------------------------------------------------------------

    def _open_episode(self) -> None:
        """Has the episode's rows sampled, scored and paired where they aren't yet, and fills the queue."""
        began = time.monotonic()
        found = self._rows()
        self.queue = self._batches(pairs_of(found))
        self.steps_here = max(1, len(self.queue))
        self.record = {"episode": self.episode + 1} | record_of(found) | {"steps": len(self.queue)}
        self.record["seconds"] = {"samples": time.monotonic() - began}
        behind = self.step - self.began_at  # by a process that was killed
        del self.queue[:behind]
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(behind)
        self.tools.progress.start(self.record["steps"], f"steps, episode {self.episode + 1}/{self.settings.episodes}")
        if behind:
            self.tools.progress.advance(behind)
        self.opened = self.curves.since = time.monotonic()  # sampling is no part of a step

    def _rows(self) -> list[dict[str, Any]]:
        """The episode's rows, from its file; which is written first where it isn't there."""
        path = self.tools.work / "episodes" / f"episode-{self.episode:03d}.parquet"
        if not path.exists():
            if self.ahead is not None:
                mine = self.ahead.rows(self.episode, self.weights_at)
            else:
                with self._sampling():
                    mine = self.share.rows(self.engine, self.episode, self.weights_at)
            found = self.share.in_order(gather_object(mine), self.episode)
            self._set_reference(found)
            if self.accelerator.is_main_process:
                write_rows(path, found)
            self.accelerator.wait_for_everyone()
            self.share.forget(self.episode)
        if self.ahead is not None and self.episode + 1 < self.settings.episodes:
            self.ahead.ask(self.episode + 1, self.weights_at)
        if self.accelerator.is_main_process:
            self._publish(self.episode)
        return read_rows(path)

    def _set_reference(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the reference's log-probabilities into the pairs of the rows."""
        pairs = pairs_of(rows)
        if self.settings.reference_at == "episode":
            set_reference(rows, self.policy_logps(pairs))
        else:
            set_reference(rows, self.reference_logps(pairs, self.reference))

    def at_reference(self) -> bool:
        """Whether the policy is the reference before this step: the start's, or the episode's."""
        if self.settings.reference_at == "episode":
            return self.step == self.began_at
        return super().at_reference()

    def _publish(self, number: int) -> None:
        """An episode's rows into the step's result."""
        name = f"episodes/episode-{number:03d}.parquet"
        (self.tools.out / "episodes").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.tools.work / name, self.tools.out / name)

    def _batches(self, pairs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
        """Whole global batches; pairs too few for one are repeated in it."""
        if not pairs:
            return []
        size = self.settings.global_batch_size
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = np.array([sum(len(pair[name]) for name in names) for pair in pairs])
        order = batch_order(lengths, self.settings.epochs, size, self.tools.seed + self.episode)
        order = np.resize(order, max(len(order), size))
        return [[pairs[i] for i in order[start : start + size]] for start in range(0, len(order), size)]

    def _close_episode(self) -> None:
        """Looks at the policy; keeps the episode or rolls it back; writes the border."""
        self.merge_the_rest()  # what is judged, kept and sampled from
        if self.step > self.began_at:
            self._keep_state()
        self.record["seconds"]["steps"] = time.monotonic() - self.opened
        lines = [line for line in self.curves.lines if "loss" in line and line["step"] > self.began_at]
        late = [line["logps/chosen_change"] for line in lines[-max(1, len(lines) // 4) :]]
        change = sum(late) / len(late) if late else 0.0
        self.record["chosen_logp_change"] = change
        found = broadcast_object_list([self._objections(change)])[0]
        self.record["rolled_back"] = found
        self.record["stopped"] = end_of_run(self.settings, [*(r["rolled_back"] for r in self.records), found])
        self.records.append(self.record)
        if found:
            self.tools.progress.say(f"episode {self.episode + 1} rolled back: {'; '.join(found)}")
            self._restore(self.weights_at)
        elif self.step > self.began_at:
            self.weights_at = self.step
        if self.record["stopped"]:
            self.tools.progress.say(f"ended after episode {self.episode + 1}: {self.record['stopped']}")
        elif self.ahead is not None and self.episode + 1 < self.settings.episodes:
            self.ahead.wait(self.episode + 1)  # its samples are of the weights that now go
            self.accelerator.wait_for_everyone()  # those of every process
        self.episode, self.queue, self.began_at = self.episode + 1, None, self.step
        self._write_border()

    # --- the guards -------------------------------------------------------------------------------------------------

    def _look_at_start(self) -> None:
        self.kept.append(self._look())
        self._say_probe(self.kept[0], {"episode": 0})

    def _objections(self, chosen_change: float) -> list[str]:
        """Looks at the policy after an episode. Why it should be rolled back; none where it may stay."""
        began = time.monotonic()
        probe = self._look()
        found = objections(self.settings, self.kept, probe, chosen_change)
        line = {"episode": self.episode + 1, "pairs": self.record["pairs"]}
        self._say_probe(probe, line | {"rolled_back": float(bool(found))})
        self.record["probe"] = probe.means()
        self.record["seconds"]["look"] = time.monotonic() - began
        if not found:
            self.kept.append(probe)
        return found

    def _look(self) -> Probe:
        """See `align.train.probe.look`; a sampler that disagrees with the trainer stops the run."""
        rows, scorer, seed = self.share.prompts.of_probe(), self.share.scorer, self.tools.seed
        with self._sampling():
            probe = look(self.engine, self, self.reference, rows, scorer, self.settings, seed, self.second)
        check_gap(self.settings, probe)
        return probe

    def _say_probe(self, probe: Probe, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.curves.write({"step": self.step} | line | probe.figures())
            score = "" if probe.score is None else f"held-out score {probe.score:.1f}, "
            gap = "" if probe.gap is None else f", gap {probe.gap:.1e}"
            self.tools.progress.say(
                f"episode {line['episode']}: {score}length {probe.length:.0f}, KL {probe.kl:.2f}{gap}"
            )

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """The model as it is for sampling, no dropout, no checkpointing of activations; and its weights in the sampler.

        A roll-back brings other weights under the same step.
        """
        training = self.model.training
        self.model.eval()
        try:
            self.engine.take(self.model, self.step)
            yield
            self.engine.rest()  # not after an error, which it would hide: an engine can't sleep amid samples
        finally:
            self.model.train(training)

    # --- what is on disk --------------------------------------------------------------------------------------------

    def _keep_state(self) -> None:
        """Weights and optimizer as they are after this step."""
        if self.accelerator.is_main_process:
            weights = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            lines = len(self.curves.lines)
            self.borders.keep(self.step, {"weights": weights, "optimizer": self.optimizer.state_dict(), "lines": lines})
        self.accelerator.wait_for_everyone()

    def _write_border(self) -> None:
        if self.accelerator.is_main_process:
            self.borders.write(
                {
                    "episode": self.episode,
                    "step": self.step,
                    "weights": self.weights_at,
                    "lines": len(self.curves.lines),
                    "records": self.records,
                    "kept": [asdict(probe) for probe in self.kept],
                }
            )
        self.accelerator.wait_for_everyone()

    def _read_border(self, border: Mapping[str, Any]) -> None:
        """What a process that goes on after a kill must know."""
        self.episode, self.records = border["episode"], border["records"]
        self.kept = [Probe(**probe) for probe in border["kept"]]
        self.began_at, self.weights_at, self.lines_before = border["step"], border["weights"], border["lines"]
        self.steps_before = max(self.began_at, self.borders.newest())
        if self.steps_before > self.began_at:
            self.lines_before = self.borders.state(self.steps_before)["lines"]

    def _restore(self, step: int) -> None:
        """Weights and optimizer as they were kept after a step."""
        state = self.borders.state(step)
        load_weights(self.model, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])

    # --- where it is ------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps that are behind, those of a killed process included."""
        return self.steps_before + int(self.state.global_step)

    def lines_behind(self, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """As many as there were: an episode's last step and the look after it have one number."""
        return list(lines[: self.lines_before])

    def place(self) -> dict[str, float]:
        """Where the training is, for the curves."""
        return {"step": self.step, "episode": self.episode + 1}

    def progress(self, step: float, steps: int) -> float:
        """By episodes, since nobody knows beforehand how many pairs an episode will give."""
        return (self.episode + min(1.0, (self.steps_before + step - self.began_at) / self.steps_here)) / (
            self.settings.episodes
        )

    def _get_learning_rate(self) -> float:
        """The one that is used: the scheduler knows nothing of where an episode begins, or a process went on."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _factor(self, step_here: int) -> float:
        where = (self.episode + min(1.0, (step_here + 0.5) / self.steps_here)) / self.settings.episodes
        return learning_rate_factor(self.settings, where)

    def chosen_change(self, upto: float = math.inf) -> float:
        """Of the last episode that was kept."""
        kept = [record["chosen_logp_change"] for record in self.records if not record["rolled_back"]]
        return kept[-1] if kept else math.nan
