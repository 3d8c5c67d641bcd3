"""Online DPO against TRL's experimental trainer: completions a second, time to a held-out score, memory, gradients.

    python benchmarks/online_dpo.py --out benchmarks/results/online_dpo.json

Everyone starts from one model (`--policy FOLDER`; by default the tiny world's SFT model, made with the quickstart's own
steps in about a quarter of a minute), samples from the same pool of prompts at temperature 1, at most 96 new tokens, is
rewarded by the same verifiers, trains batches of 16 pairs with beta 0.1, and gets the same number of completions.

- `ours`: the stage `online-dpo`, six completions a prompt, as the quickstart does. `ours, two`: two, as TRL has.
- `trl`: OnlineDPOTrainer with its defaults, but for what a CPU needs (no bf16) and the settings above; it is slow, and
  gets a sixth of the completions, for its speed alone.
- `trl, best`: gradient checkpointing off, which switches the KV cache of its generation on; a penalty for a missing end
  token; its learning rate is the one of `RATES` that ends best on the development split.

Each runs in a process of its own, on one thread; times are its processor time. A completion counts when it has come;
the time of generation is all that the generating call takes, prompts and padding included. The held-out score is the
share of greedy answers to prompts of the development split that verify, by the same function for all, and is no part
of anyone's time; nor are the verifiers' own processes. Guards of ours are off (probe_prompts=0): TRL has none.

At last one batch of 16 prompts with given completions, split into 1, 2 and 4 micro batches: the gradient's norm should
not depend on that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ |= {
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

import yaml
from machine import machine

ROOT = Path(__file__).resolve().parent.parent
COMPLETIONS, BATCH, MAX_TOKENS, BETA, RATE = 1800, 16, 96, 0.1, 2e-4
RATES = (1e-4, 2e-4)
HELD_OUT = 240
BAR = 4.0
"""Completions a second of generation, ours against TRL's best, two of each prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, help="the model to start from")
    parser.add_argument("--work", type=Path, help="where the default start and the prompts are made and kept")
    parser.add_argument("--completions", type=int, default=COMPLETIONS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="some of the contestants")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=RATE, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contestant:
        run = {"gradients": gradients}.get(given.contestant, contest)
        print(json.dumps(run(given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        given.work = given.work or Path(folder)
        made = make(given.work)
        given.policy = given.policy or made
        found: dict[str, Any] = {"runs": {}}
        if given.only and given.out and given.out.exists():
            found = json.loads(given.out.read_text())
        names = given.only or ["ours", "ours, two", "trl", "trl, best", "gradients"]
        for name in names:
            rates = RATES if name == "trl, best" else (RATE,)
            tried = [(rate, alone(given, name, rate)) for rate in rates]
            rate, result = max(tried, key=lambda pair: pair[1].get("end", 0.0))
            if name == "gradients":
                found["gradients"] = result
            else:
                result |= {"learning_rate": rate, "ends_by_rate": {f"{r:g}": each["end"] for r, each in tried}}
                found["runs"][name] = result
            print(f"{name}: {json.dumps({k: v for k, v in result.items() if k != 'curve'})}", flush=True)
            if given.out:
                found |= summary(found["runs"]) | {"date": str(date.today()), "machine": machine(), "seed": given.seed}
                given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(summary(found["runs"]), indent=1))
    times = summary(found["runs"]).get("completions_a_second_ours_against", {}).get("trl, best")
    if times is not None and times < BAR:
        sys.exit(f"bar missed: {times} < {BAR}")


def alone(given: argparse.Namespace, name: str, rate: float) -> dict[str, Any]:
    """One contestant in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, "--policy", str(given.policy), "--work", str(given.work)]
    completions = given.completions // (6 if name == "trl" else 1)
    command += ["--completions", str(completions), "--seed", str(given.seed), "--rate", str(rate)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ)
    if done.returncode:
        sys.exit(f"{name}: see above")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Rates and times side by side."""
    rates = {name: run["completions_a_second"] for name, run in runs.items()}
    out: dict[str, Any] = {"completions_a_second": rates}
    if "ours, two" in rates:
        out["completions_a_second_ours_against"] = {
            name: round(rates["ours, two"] / rate, 2) for name, rate in rates.items() if name.startswith("trl")
        }
    others = [run for name, run in runs.items() if name == "trl, best"]
    if others:
        best = max(point["score"] for run in others for point in run["curve"])
        start = others[0]["start"]
        targets = sorted({round(start + 0.5 * (best - start), 2), best})
        out["cpu_s_to_score"] = {
            f"{t:g}": {name: time_to(run["curve"], t) for name, run in runs.items()} for t in targets
        }
    out["peak_memory_mib"] = {name: run["peak_memory_mib"] for name, run in runs.items()}
    return out


def time_to(curve: Sequence[dict[str, float]], score: float) -> float | None:
    return next((point["cpu_s"] for point in curve if point["score"] >= score), None)


def make(work: Path) -> Path:
    """The default start and the prompts, with the quickstart's own steps; done once a folder."""
    steps = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())["steps"]
    chosen = {name: steps[name] for name in ("written", "demonstrations", "sft", "fresh")}
    work.mkdir(parents=True, exist_ok=True)
    file = work / "start.yaml"
    file.write_text(yaml.safe_dump({"name": "start", "seed": 1, "steps": chosen}, sort_keys=False))
    command = [sys.executable, "-m", "align.cli", "run", str(file), f"out={work / 'start'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return work / "start" / "sft" / "model"


# --- in a contestant's process ----------------------------------------------------------------------------------------


class Watch:
    """Processor time without that of looking at the held-out prompts; a curve of their score."""

    def __init__(self, policy: Any, prompts: Any, verifiers: Any) -> None:
        from align.core.engines.transformers_engine import TransformersEngine
        from align.train.models import load_tokenizer

        self.verifiers, self.completions = verifiers, 0
        self.generating = self.apart = 0.0
        self.rows = [row for row in prompts.rows() if row["split"] == "dev"][:HELD_OUT]
        self.curve: list[dict[str, float]] = []
        self.engine = lambda model: TransformersEngine(model, load_tokenizer(policy), fingerprint="held out")
        self.began = time.process_time()

    def look(self, model: Any) -> float:
        """The score now, in percent."""
        from align.core.engines.base import SamplingParams

        before = time.process_time()
        so_far = {"cpu_s": round(before - self.began - self.apart, 2), "completions": self.completions}
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        done = {n: c for n, _, c in self.engine(model).sample([row["prompt"] for row in self.rows], 1, params)}
        asked = [(row, done[number].text, done[number].finish_reason) for number, row in enumerate(self.rows)]
        score = 100 * sum(rewards(self.verifiers, asked)) / len(asked)
        self.curve.append(so_far | {"score": round(score, 2), "generating_cpu_s": round(self.generating, 2)})
        self.apart += time.process_time() - before
        return score

    def callback(self, every: int) -> Any:
        """Looks before the first step, after every so many, and at the end."""
        from transformers import TrainerCallback

        watch = self

        class Looks(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                watch.look(model)

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if state.global_step % every == 0:
                    watch.look(model)

            def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                watch.look(model)

        return Looks()

    def figures(self) -> dict[str, Any]:
        """Of the whole run."""
        last = self.curve[-1]
        return {
            "completions": self.completions,
            "completions_a_second": round(self.completions / self.generating, 1),
            "generating_cpu_s": round(self.generating, 1),
            "cpu_s": last["cpu_s"],
            "start": self.curve[0]["score"],
            "end": last["score"],
            "best": max(point["score"] for point in self.curve),
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "curve": self.curve,
        }


def rewards(verifiers: Any, asked: Sequence[tuple[Any, str, str]]) -> list[float]:
    """1 for a completion that verifies; one that was cut off has failed."""
    rows = [(row["task"], text, row["reference"], row["prompt"][-1]["content"]) for row, text, _ in asked]
    found = verifiers.verify_many(rows)
    return [float(v.verdict == "passed" and end == "stop") for v, (_, _, end) in zip(found, asked, strict=True)]


def contest(given: argparse.Namespace) -> dict[str, Any]:
    """One contestant's run; its figures."""
    import torch

    from align.core.store import Table
    from reward.verifiers import Verifiers

    torch.set_num_threads(1)
    prompts = Table.open(given.work / "start" / "fresh")
    with Verifiers(say=lambda line: None) as verifiers:
        watch = Watch(model_ref(given.policy), prompts, verifiers)
        if given.contestant.startswith("ours"):
            ours(given, prompts, watch, 2 if given.contestant.endswith("two") else 6)
        else:
            trl(given, prompts, watch, best=given.contestant.endswith("best"))
        return watch.figures()


def model_ref(policy: Path) -> Any:
    from align.core.records import Kind
    from align.core.store import ModelRef

    return ModelRef.open(str(policy), Kind.MODEL)


def ours(given: argparse.Namespace, prompts: Any, watch: Watch, each: int) -> None:
    from align.train.online_trainer import OnlineDPO

    with timed_engine(watch), tempfile.TemporaryDirectory() as folder:
        train = OnlineDPO.train

        def train_and_look(self: Any, *arguments: Any, **named: Any) -> Any:
            self.add_callback(watch.callback(every=3 if each == 6 else 6))
            return train(self, *arguments, **named)

        OnlineDPO.train = train_and_look  # type: ignore[method-assign]
        episodes = 4
        stage(given, prompts, Path(folder), {
            "episodes": episodes, "prompts_per_episode": given.completions // (episodes * each),
            "samples_per_prompt": each, "learning_rate": given.rate,
        })  # fmt: skip


def stage(
    given: argparse.Namespace, prompts: Any, folder: Path, settings: dict[str, Any], micro: int = 0
) -> list[dict[str, Any]]:
    """Runs the stage; its curves."""
    from align.core.stage import Tools
    from align.progress import Silent
    from align.train.online_dpo import STAGE

    config = STAGE.config(
        scorer="verifier", max_tokens=MAX_TOKENS, max_length=512, global_batch_size=BATCH, beta=BETA, nll_weight=1.0,
        probe_prompts=0, **settings,
    )  # fmt: skip
    (folder / "work").mkdir(parents=True)
    speed = {"device": "cpu", "micro_batch_size": micro}
    tools = Tools(given.seed, {}, Silent(), folder / "work", folder, speed)
    STAGE.run(config, {"policy": model_ref(given.policy), "prompts": prompts}, tools)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class timed_engine:  # noqa: N801
    """Within it, what the embedded engine samples with its own seeds is counted and timed, but for held-out looks."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        from align.core.engines.transformers_engine import TransformersEngine

        watch, sample = self.watch, TransformersEngine.sample

        def timed(engine: Any, *arguments: Any, **named: Any) -> Iterator[Any]:
            if engine.fingerprint == "held out":
                yield from sample(engine, *arguments, **named)
                return
            stream = sample(engine, *arguments, **named)
            while True:
                began = time.process_time()
                found = next(stream, None)
                watch.generating += time.process_time() - began
                if found is None:
                    return
                watch.completions += 1
                yield found

        self.plain, TransformersEngine.sample = sample, timed  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        from align.core.engines.transformers_engine import TransformersEngine

        TransformersEngine.sample = self.plain  # type: ignore[method-assign]


def trl(given: argparse.Namespace, prompts: Any, watch: Watch, best: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(given, prompts, watch, folder, best)
        trainer.add_callback(watch.callback(every=8))
        trainer.train()


def trl_trainer(
    given: argparse.Namespace, prompts: Any, watch: Watch, folder: str, best: bool, micro: int = BATCH, **more: Any
) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class Timed(OnlineDPOTrainer):  # type: ignore[misc]
        def _generate(self, *arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            found = super()._generate(*arguments, **named)
            watch.generating += time.process_time() - began
            watch.completions += len(found[0])
            return found

    tokenizer = AutoTokenizer.from_pretrained(given.policy)
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", tokenizer.eos_token]))
    rows = [row for row in prompts.rows() if row["split"] == "train"]
    needed = given.completions // 2
    rows = (rows * (needed // len(rows) + 1))[:needed]
    names = ("prompt", "task", "reference")
    dataset = Dataset.from_list([{name: row[name] for name in names} for row in rows]).shuffle(seed=given.seed)

    def reward(prompts: Any, completions: Any, completion_ids: Any, task: Any, reference: Any, **_: Any) -> list[float]:
        asked = [
            ({"prompt": p, "task": t, "reference": r}, c[0]["content"], "stop" if ends & set(ids) else "length")
            for p, c, ids, t, r in zip(prompts, completions, completion_ids, task, reference, strict=True)
        ]
        return rewards(watch.verifiers, asked)

    settings: dict[str, Any] = {"missing_eos_penalty": 1.0, "gradient_checkpointing": False} if best else {}
    arguments = OnlineDPOConfig(
        output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=BATCH // micro,
        learning_rate=given.rate, lr_scheduler_type="cosine", beta=BETA, temperature=1.0, max_new_tokens=MAX_TOKENS,
        max_length=512, num_train_epochs=1, use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, log_level="error", seed=given.seed, **settings, **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(given.policy, dtype=torch.float32)
    return Timed(model, None, reward, arguments, train_dataset=dataset, processing_class=tokenizer)


def gradients(given: argparse.Namespace) -> dict[str, Any]:
    """The first step's gradient norm with one global batch in 1, 2 and 4 micro batches, the completions held fixed."""
    import torch

    from align.core.store import Table
    from reward.verifiers import Verifiers

    torch.set_num_threads(1)
    prompts = Table.open(given.work / "start" / "fresh")
    found: dict[str, dict[str, float]] = {"ours": {}, "trl, best": {}}
    given.completions = 2 * BATCH
    with Verifiers(say=lambda line: None) as verifiers:
        watch = Watch(model_ref(given.policy), prompts, verifiers)
        kept: dict[str, Any] = {}
        for parts in (1, 2, 4):
            with tempfile.TemporaryDirectory() as folder:
                settings = {"episodes": 1, "prompts_per_episode": 64, "samples_per_prompt": 6}
                lines = stage(given, prompts, Path(folder), settings, micro=BATCH // parts)
                found["ours"][str(parts)] = next(line["grad_norm"] for line in lines if "grad_norm" in line)
            with tempfile.TemporaryDirectory() as folder:
                trainer = trl_trainer(given, prompts, watch, folder, best=True, micro=BATCH // parts, max_steps=1)
                trainer._generate = same_completions(trainer, kept)
                trainer.train()
                found["trl, best"][str(parts)] = trainer.state.log_history[0]["grad_norm"]
    return {"norm_by_micro_batches": found}


def same_completions(trainer: Any, kept: dict[str, Any]) -> Any:
    """The trainer's generation, that gives a prompt the two completions that it got the first time."""
    import torch

    generate = trainer._generate

    def again(model: Any, prompts: Any, images: Any = None) -> Any:
        if not all(str(prompt) in kept for prompt in prompts):
            ids, mask, completions, its, _ = generate(model, prompts, images)
            for number, prompt in enumerate(prompts):
                both = [number, number + len(prompts)]
                kept[str(prompt)] = (ids[number][mask[number] == 1], [completions[i][its[i] == 1] for i in both])
        of = [kept[str(prompt)] for prompt in prompts]
        sides = [(each[0], each[1][side]) for side in (0, 1) for each in of]
        longest = [max(len(side[part]) for side in sides) for part in (0, 1)]
        pad = trainer.processing_class.pad_token_id
        tensors = [torch.full((len(sides), longest[part]), pad) for part in (0, 1)]
        masks = [torch.zeros(len(sides), longest[part], dtype=torch.long) for part in (0, 1)]
        for row, (prompt, completion) in enumerate(sides):
            tensors[0][row, longest[0] - len(prompt) :], masks[0][row, longest[0] - len(prompt) :] = prompt, 1
            tensors[1][row, : len(completion)], masks[1][row, : len(completion)] = completion, 1
        return tensors[0], masks[0], tensors[1], masks[1], None

    return again


if __name__ == "__main__":
    main()
