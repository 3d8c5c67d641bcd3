"""A run's folder as the pipeline leaves it, small, with every kind of step that the page shows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from align.core.manifest import Manifest, Origin, versions
from align.core.records import Kind
from align.core.writer import write_rows
from align.evaluate.scores import Tally

EVIL = "<script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>&amp;\"'"
FAMILIES = ("math", "code", "format", "tag", "benign", "harmful")


def say(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def prompt_row(number: int, text: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": f"p{number}",
        "prompt": say("user", text or f"Tom has {number} apples and gets {number % 7} more. How many has he now?"),
        "split": "train",
        "source": "tiny",
        "task": "math",
        "family": FAMILIES[number % len(FAMILIES)],
        "reference": json.dumps({"answer": str(number + number % 7)}),
        **more,
    }


class Builder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self.rng = random.Random(0)

    def step(
        self,
        name: str,
        stage: str,
        inputs: dict[str, str] | None = None,
        engines: dict[str, str] | None = None,
        rows: list[dict[str, Any]] | None = None,
        kind: Kind = Kind.PROMPTS,
        summary: dict[str, Any] | None = None,
        done: bool = True,
        settings: dict[str, Any] | None = None,
        curves: list[dict[str, float]] | None = None,
    ) -> None:
        inputs, engines = inputs or {}, engines or {}
        needs = [n for n in dict.fromkeys([*inputs.values(), *engines.values()]) if n != "tiny"]
        fingerprint = f"{len(self.steps):032x}"
        self.steps.append(
            {"step": name, "stage": stage, "gives": kind.value, "needs": needs, "fingerprint": fingerprint}
        )
        if not done:
            return
        place = self.folder / name
        place.mkdir(parents=True)
        if rows is not None:
            write_rows(place, rows, kind)
        if curves:
            (place / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in curves) + '{"step": 9, "lo'
            )
        origins = {
            role: Origin(name=n, path=n, fingerprint="f", step=None if n == "tiny" else n)
            for role, n in {**inputs, **engines}.items()
        }
        seconds = self.rng.uniform(0.5, 40)
        Manifest(
            step=name, stage=stage, fingerprint=fingerprint, settings=settings or {"split": "test", "max_tokens": 96},
            seed=17, inputs={r: origins[r] for r in inputs}, engines={r: origins[r] for r in engines},
            rows=None if rows is None else len(rows), seconds=seconds, cpu_seconds=1.4 * seconds,
            summary=summary or {}, versions=versions(),
        ).write(place)  # fmt: skip

    def evaluation(self, name: str, policy: str, greedy: float, sampled: float, items: int = 240) -> None:
        """Rows with the given shares of right answers, and the table that `evaluate` makes of them."""
        rows, scores = [], {}
        for mode, share in (("greedy", greedy), ("sampled", sampled)):
            tally = Tally(1)
            for number in range(items):
                passed = random.Random(f"{number}/{mode}").random() + self.rng.gauss(0, 0.08) < share
                row = prompt_row(number, split="test") | {
                    "mode": mode,
                    "sample_index": 0,
                    "completion": say("assistant", f"{number} + {number % 7} = {number + number % 7}\n#### {number}"),
                    "finish_reason": "stop" if number % 40 else "length",
                    "reward": float(passed),
                    "verdict": "passed" if passed and number % 40 else "failed",
                    "detail": "" if passed else f"found {number}, expected {number + number % 7}",
                    "generator": policy,
                    "rendered_prompt": "",
                }
                tally.add(row)
                rows.append(row)
            scores[mode] = tally.scores()
        self.step(
            name, "evaluate", {"prompts": "heldout"}, {"policy": policy}, rows, Kind.COMPLETIONS, {"scores": scores}
        )

    def finish(self) -> Path:
        about = {"name": "quickstart", "seed": 1, "steps": self.steps, "recipe": "name: quickstart"}
        (self.folder / "run.json").write_text(json.dumps(about))
        return self.folder


def training(steps: int, **more: tuple[float, float]) -> list[dict[str, float]]:
    """Lines of curves that go from one value to another, with noise."""
    rng = random.Random(steps)
    lines = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-4 * step / steps)
        line = {"step": step, "epoch": step / 40, "learning_rate": 1e-3 * (1 - step / steps)}
        for name, (start, end) in more.items():
            line[name.replace("__", "/")] = start + (end - start) * done + rng.gauss(0, 0.03 * abs(end - start))
        lines.append(line)
    return lines


def completion(number: int, index: int, text: str, passed: bool) -> dict[str, Any]:
    return prompt_row(number) | {
        "sample_index": index, "completion": say("assistant", text), "reward": float(passed), "detail": "",
        "verdict": "passed" if passed else "failed", "generator": "sft", "finish_reason": "stop", "kept": passed,
    }  # fmt: skip


def reward_summary() -> dict[str, Any]:
    def figures(sampled: float, best: float, closed: str = "") -> dict[str, Any]:
        return {
            "groups": 80, "sampled": sampled, "best_of_n": best, "oracle": min(1, best + 0.1), "pair_accuracy": 0.81,
            "accuracy_by_gap": [], "length_correlation": -0.21, "right_pairs": 0.6, "right_pairs_gated": 0.95,
            "accepted": 0.4,
            "gate": {"best_above": -1.2, "worst_below": -4.5, "gap": 0.5, "closed": closed},
        }  # fmt: skip

    by_family = {name: figures(0.3 + 0.1 * i, 0.5 + 0.08 * i) for i, name in enumerate(FAMILIES)}
    by_family["format"] = figures(0.5, 0.4, "its favourites are right less often (0.40) than samples (0.50)")
    overall = figures(0.6, 0.78)
    del overall["gate"]
    return {"prompts": 1200, "evaluations": [{"step": 0, "best_of_n": 0.5}], "overall": overall, "by_family": by_family}


def quickstart(folder: Path) -> Path:
    """The whole ladder with a control, one step not done yet."""
    run = Builder(folder)
    run.step("heldout", "prompts", rows=[prompt_row(i, split="test") for i in range(240)])
    run.evaluation("base_eval", "tiny", 0.03, 0.02)
    run.step("written", "prompts", rows=[prompt_row(i) for i in range(300)], settings={"source": {"tiny": {"seed": 1}}})
    demos = [{**prompt_row(i), "completion": say("assistant", f"#### {i}")} for i in range(300)]
    run.step("demonstrations", "demonstrate", {"completions": "written"}, rows=demos, kind=Kind.DEMONSTRATIONS)
    run.step(
        "sft", "sft", {"model": "tiny", "demonstrations": "demonstrations"},
        curves=training(150, loss=(3.1, 0.35), mean_token_accuracy=(0.4, 0.93), grad_norm=(4.0, 0.8)),
    )  # fmt: skip
    run.evaluation("sft_eval", "sft", 0.63, 0.55)
    run.step("pool", "prompts", rows=[prompt_row(i) for i in range(2600)])
    tags = {"addition": (1800, 120), "list": (900, 90), "json": (300, 80), "upper case": (200, 70), "code": (400, 88)}
    tags["greeting a person with a very long tag name"] = (120, 30)
    tagged = [prompt_row(i, tags=["addition", "list"][: 1 + i % 2], raw_tags='["addition"]') for i in range(40)]
    run.step("tagged", "tag", {"prompts": "pool"}, {"tagger": "sft"}, tagged)
    ontology = [{"tag": t, "count": b, "members": [t], "parent": None, "examples": ["x"]} for t, (b, _) in tags.items()]
    run.step("ontology", "ontology", {"prompts": "tagged"}, rows=ontology, kind=Kind.ONTOLOGY)
    summary = {
        "pool": 2600, "selected": 250, "complexity_before": 1.4, "complexity_after": 3.1, "coverage_before": 1.0,
        "coverage_after": 1.0, "tags_before": {t: b for t, (b, _) in tags.items()},
        "tags_after": {t: a for t, (_, a) in tags.items()},
    }  # fmt: skip
    run.step("selected", "select", {"prompts": "tagged", "ontology": "ontology"}, rows=tagged[:20], summary=summary)
    samples = [completion(i // 3, i % 3, EVIL if i == 0 else f"so {i}\n#### {i}", i % 3 != 1) for i in range(90)]
    yields = {"yield": {"sampled": 1090, "kept": 60}, "lost": {"wrong": 1000, "<b>cut off</b>": 30}}
    run.step("samples", "reject", {"prompts": "selected"}, {"sampler": "sft"}, samples, Kind.COMPLETIONS, yields)
    run.step("kept", "demonstrate", {"completions": "samples"}, rows=demos[:60], kind=Kind.DEMONSTRATIONS)
    run.step(
        "rft",
        "sft",
        {"model": "tiny", "demonstrations": "kept"},
        curves=training(300, loss=(3.1, 0.3), grad_norm=(4, 1)),
    )
    run.evaluation("rft_eval", "rft", 0.69, 0.64)
    run.step("unfiltered", "demonstrate", {"completions": "samples"}, rows=demos[:60], kind=Kind.DEMONSTRATIONS)
    run.step("control_unfiltered", "sft", {"model": "tiny", "demonstrations": "unfiltered"},
             curves=training(300, loss=(3.1, 0.5)))  # fmt: skip
    run.step("scored", "reject", {"prompts": "pool"}, {"sampler": "rft"}, samples, Kind.COMPLETIONS)
    pairs = [
        {**{k: v for k, v in prompt_row(i).items() if k in ("prompt_id", "prompt", "split", "family")},
         "chosen": say("assistant", f"#### {i}"), "rejected": say("assistant", f"#### {i + 1}"), "margin": 1.0,
         "generator": "rft"}
        for i in range(50)
    ]  # fmt: skip
    run.step("pairs", "pair", {"completions": "scored"}, rows=pairs, kind=Kind.PREFERENCES)
    run.step(
        "dpo", "dpo", {"policy": "rft", "preferences": "pairs"},
        summary={"chosen_logp_change": -0.4, "warnings": ["the chosen completions lost 0.4 nats"]},
        curves=training(90, loss=(0.69, 0.2), rewards__margins=(0.0, 2.1), rewards__accuracies=(0.5, 0.92),
                        logps__chosen=(-20, -21), logps__rejected=(-22, -41), nll_loss=(0.5, 0.45)),
    )  # fmt: skip
    run.evaluation("dpo_eval", "dpo", 0.81, 0.70)
    rm_curves = training(120, loss=(0.7, 0.3)) + [{"step": s, "best_of_n": 0.5 + s / 400} for s in (0, 40, 80, 120)]
    run.step("reward", "reward", {"model": "dpo", "completions": "scored"}, summary=reward_summary(), curves=rm_curves,
             kind=Kind.REWARD_MODEL)  # fmt: skip
    run.evaluation("control_unfiltered_eval", "control_unfiltered", 0.66, 0.52)
    run.step("online", "online-dpo", {"policy": "dpo", "prompts": "pool", "reward_model": "reward"}, done=False)
    return run.finish()
