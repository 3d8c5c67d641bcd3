"""The DPO trainer with an episode buffer: when it is empty, the policy is sampled from and its pairs are trained on.

One optimizer and one schedule over all episodes. At each border between two episodes weights, optimizer and what was
seen so far are written as one file: a killed run goes on from there, and an episode that a guard objects to is undone
with it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from align.core.errors import RunError
from align.core.stage import Tools
from align.train.data import batch_order
from align.train.episode_file import pairs_of, read_rows, record_of, set_reference, write_rows
from align.train.episodes import Prompts, episode_rows, samples_of
from align.train.guards import Probe, look, objections
from align.train.online_settings import Config
from align.train.preference import DPO
from align.train.samplers import Live, Sampler
from align.train.scoring import Scorer
from align.train.trainer import learning_rate_factor


class OnlineDPO(DPO):
    """Pairs come from the live policy, an episode at a time; sampled ids are trained as they are.

    Not generated inside the DataLoader: that reads one batch ahead, which would be of the policy before.

    Attributes:
        episode: how many are behind.
        records: what became of each, for the summary.
        kept: probes of the start and of every episode that stayed.
    """

    settings: Config
    announces = False  # each episode says how many steps it has

    def __init__(
        self,
        settings: Config,
        tools: Tools,
        prompts: Prompts,
        scorer: Scorer,
        reference: Any,
        sampler: Sampler | None = None,
        **trl: Any,
    ) -> None:
        self.episode, self.steps_before, self.steps_here = 0, 0, 1
        self.records: list[dict[str, Any]] = []
        self.kept: list[Probe] = []
        self.queue: list[list[Mapping[str, Any]]] | None = None  # global batches; None between two episodes
        super().__init__(settings, tools, rows=1, **trl)
        self.prompts, self.scorer = prompts, scorer
        self.reference = None if reference is None else self.score_like_the_policy(reference)
        self.engine = sampler or Live(self.model, self.processing_class, self.precision)
        self.border = tools.work / "border.pt"
        self.began_at = 0  # step at which the episode began
        self.begun = False
        if self.border.exists():
            self._read_record(torch.load(self.border, weights_only=True, map_location="cpu"))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The micro batches of the next optimizer step; between two episodes, what makes the next one."""
        if not self.begun:
            self._begin()
        while not self.queue:
            if self.queue is not None:
                self._close_episode()
            stopped = bool(self.records) and self.records[-1]["stopped"]
            if stopped or self.episode == self.settings.episodes:
                self.control.should_training_stop = True
                return [], None
            self._open_episode()
        rows = self.queue.pop(0)
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        mine = [rows[(i * world + self.args.process_index) * size :][:size] for i in range(num_batches)]
        batches = [self.batch(micro) for micro in mine]
        self.look_over(batches)
        return batches, None

    def _begin(self) -> None:
        """The start's probe and the first border; or, after a kill, the last border."""
        self.begun = True
        if self.border.exists():
            self._restore()
            return
        self.kept.append(self._look())
        self._say_probe(self.kept[0], {"episode": 0})
        self._write_border()

    def _open_episode(self) -> None:
        """Samples, scores, pairs, computes reference log-probabilities, fills the queue."""
        config, tools = self.settings, self.tools
        path = tools.work / "episodes" / f"episode-{self.episode:03d}.parquet"
        if not path.exists():
            rows = self.prompts.of_episode(self.episode)
            share = rows[self.args.process_index :: self.args.world_size]
            what = f"samples, episode {self.episode + 1}/{config.episodes}"
            tools.progress.start(samples_of(config, len(share)), what)
            with self._sampling():
                found = episode_rows(
                    self.engine,
                    share,
                    self.scorer,
                    config,
                    tools.seed,
                    self.episode,
                    self.processing_class,
                    tools.progress,
                    gather_object,
                )
            # In the prompts' order, whatever the number of processes.
            order = {row["prompt_id"]: place for place, row in enumerate(rows)}
            found = sorted(gather_object(found), key=lambda row: order[row["prompt_id"]])
            set_reference(found, self.reference_logps(pairs_of(found), self.reference))
            if self.accelerator.is_main_process:
                write_rows(path, [row | {"policy_step": self.step} for row in found])
            self.accelerator.wait_for_everyone()
        found = read_rows(path)
        if self.accelerator.is_main_process:
            public = tools.out / "episodes" / path.name
            public.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, public)
        pairs = pairs_of(found)
        self.queue = self._batches(pairs)
        self.began_at, self.steps_here = self.step, max(1, len(self.queue))
        self.record = {"episode": self.episode + 1} | record_of(found) | {"steps": len(self.queue)}
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(0)
        tools.progress.start(len(self.queue), f"steps, episode {self.episode + 1}/{config.episodes}")
        self.curves.since = time.monotonic()  # sampling is no part of a step

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
        probe = self._look()
        lines = [line for line in self.curves.lines if "loss" in line and line["step"] > self.began_at]
        late = [line["logps/chosen_change"] for line in lines[-max(1, len(lines) // 4) :]]
        change = sum(late) / len(late) if late else 0.0
        found = broadcast_object_list([objections(self.settings, self.kept, probe, change)])[0]
        self.record |= {"chosen_logp_change": change, "probe": asdict(probe), "rolled_back": found}
        self.record["stopped"] = bool(found) and self.settings.after_rollback == "stop"
        self._say_probe(probe, {"episode": self.episode + 1, "pairs": self.record["pairs"]})
        if found:
            self.tools.progress.say(f"episode {self.episode + 1} rolled back: {'; '.join(found)}")
            self._restore()
        else:
            self.kept.append(probe)
        self.records.append(self.record)
        self.episode, self.queue = self.episode + 1, None
        self._write_border()

    def _look(self) -> Probe:
        """See `guards.look`; a sampler that disagrees with the trainer stops the run."""
        rows = self.prompts.of_probe()
        with self._sampling():
            probe = look(self.engine, self, self.reference, rows, self.scorer, self.settings, self.tools.seed)
        if not probe.gap <= self.settings.max_sampler_gap:
            raise RunError(
                f"sampler and trainer disagree by {probe.gap:.3g} nats a token, more than max_sampler_gap "
                f"{self.settings.max_sampler_gap:g}: pairs would not be of the policy that is trained; sample in the "
                "trainer's precision, or allow more"
            )
        return probe

    def _say_probe(self, probe: Probe, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.curves.write({"step": self.step} | line | probe.figures())
            score = "" if probe.score is None else f"held-out score {probe.score:.1f}, "
            self.tools.progress.say(
                f"episode {line['episode']}: {score}length {probe.length:.0f}, KL {probe.kl:.2f}, gap {probe.gap:.1e}"
            )

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """The model as it is for sampling: no dropout, no checkpointing of activations."""
        training = self.model.training
        self.model.eval()
        try:
            self.engine.take(self.model, self.step)
            yield
        finally:
            self.engine.rest()
            self.model.train(training)

    # --- the border between two episodes ----------------------------------------------------------------------------

    def _write_border(self) -> None:
        if self.accelerator.is_main_process:
            trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            border = {
                "weights": trained,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "episode": self.episode,
                "records": self.records,
                "kept": [asdict(probe) for probe in self.kept],
            }
            part = Path(f"{self.border}.part")
            torch.save(border, part)
            part.rename(self.border)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Weights and optimizer as they were at the last border."""
        border = torch.load(self.border, weights_only=True, map_location="cpu")
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in border["weights"].items():
                parameters[name].copy_(tensor)
        self.optimizer.load_state_dict(border["optimizer"])

    def _read_record(self, border: Mapping[str, Any]) -> None:
        """What a process that goes on after a kill must know."""
        self.steps_before, self.episode, self.records = border["step"], border["episode"], border["records"]
        self.kept = [Probe(**probe) for probe in border["kept"]]

    @property
    def step(self) -> int:
        """Optimizer steps that are behind, those of a killed process included."""
        return self.steps_before + int(self.state.global_step)

    def place(self) -> dict[str, float]:
        """Where the training is, for the curves."""
        return {"step": self.step, "episode": self.episode + 1}

    def progress(self, step: float, steps: int) -> float:
        """By episodes, since nobody knows beforehand how many pairs an episode will give."""
        return (self.episode + min(1.0, (self.steps_before + step - self.began_at) / self.steps_here)) / (
            self.settings.episodes
        )

    def _factor(self, step_here: int) -> float:
        where = (self.episode + min(1.0, (step_here + 0.5) / self.steps_here)) / self.settings.episodes
        return learning_rate_factor(self.settings, where)

    def chosen_change(self, upto: float = math.inf) -> float:
        """Of the last episode that was kept."""
        kept = [record["chosen_logp_change"] for record in self.records if not record["rolled_back"]]
        return kept[-1] if kept else math.nan
