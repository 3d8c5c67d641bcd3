"""The card beside a trained model: what the Hub reads, the way back to the sources, and the picture of the curves."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import yaml

from align.core.ancestry import ancestors_of, hub_id, shown, sources_in
from align.core.card import Card
from align.core.manifest import Manifest, Origin
from align.core.model_card import write_model_card
from align.core.records import Kind

START = {
    "kept": 160, "left_out": {"too_long": 3, "split_dev": 0}, "unit": "pairs", "tokens": 9000, "learned_tokens": 4000,
    "longest": 210, "batch": {"rows": 16}, "steps": 20, "layout": "flat", "parameters": 494_000_000,
    "trained": 494_000_000, "place": "cpu, fp32",
}  # fmt: skip


def step(run: Path, name: str, stage: str, inputs: dict[str, Origin] | None = None, **more: Any) -> Origin:
    about: dict[str, Any] = {"step": name, "stage": stage, "fingerprint": f"{name}-print", "inputs": inputs or {}}
    (run / name).mkdir(parents=True)
    Manifest(**about | more).write(run / name)
    return Origin(name=name, path=name, fingerprint=f"{name}-print", step=name)


def a_run(run: Path) -> dict[str, Origin]:
    """Prompts of a local file and of the Hub, samples, pairs; SFT of a model of the Hub. Gives DPO's inputs."""
    source = [str(run / "secret" / "mine.jsonl"), {"path": "openai/gsm8k", "split": "train"}]
    prompts = step(run, "prompts", "prompts", rows=300, settings={"source": source})
    demos = Origin(name="Capybara", path="trl-lib/Capybara", fingerprint="cd")
    base = Origin(name="Qwen/Qwen2.5-0.5B@main", path="Qwen/Qwen2.5-0.5B@main", fingerprint="q")
    sft = step(run, "sft", "sft", {"model": base, "demonstrations": demos}, version=2)
    lost = {"lost": {"wrong": 1107, "cut off": 46}}
    samples = step(run, "samples", "reject", {"prompts": prompts}, engines={"sampler": sft}, rows=1800, summary=lost)
    pairs = step(run, "pairs", "pair", {"completions": samples}, rows=163)
    (run / "dpo" / "model").mkdir(parents=True)
    return {"policy": sft, "preferences": pairs}


def written(run: Path, kind: Kind, origins: dict[str, Origin], **card: Any) -> tuple[dict[str, Any], str]:
    about: dict[str, Any] = {"title": "demo: dpo", "stage": "dpo 2", "settings": {"beta": 0.1}}
    write_model_card(run / "dpo", Card(**about | card), kind, origins, {"python": "3.11"})
    _, header, page = (run / "dpo" / "model" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), page


def test_the_hub_reads_base_model_data_sets_and_task(tmp_path: Path) -> None:
    header, _ = written(tmp_path, Kind.MODEL, a_run(tmp_path), summary={"start": START})
    assert header == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["align", "model", "dpo", "trl"],
        "base_model": "Qwen/Qwen2.5-0.5B", "base_model_relation": "finetune",
        "datasets": ["trl-lib/Capybara", "openai/gsm8k"],
    }  # fmt: skip


def test_adapters_are_told_as_such(tmp_path: Path) -> None:
    origins = a_run(tmp_path)
    (tmp_path / "dpo" / "model" / "adapter_config.json").write_text("{}")
    header, page = written(tmp_path, Kind.MODEL, origins)
    assert header["library_name"] == "peft" and header["base_model_relation"] == "adapter"
    assert "AutoPeftModelForCausalLM" in page


def test_the_lineage_goes_down_to_the_sources_with_counts_and_losses(tmp_path: Path) -> None:
    _, page = written(tmp_path, Kind.MODEL, a_run(tmp_path), summary={"start": START})
    lines = page.splitlines()
    rows = {line.split(" | ")[0].strip("| `"): line for line in lines if line.startswith("| ")}
    assert rows["mine.jsonl"].startswith("| `mine.jsonl` | from outside |")
    assert rows["prompts"] == "| prompts | prompts 1 | mine.jsonl, openai/gsm8k | 300 rows |  |"
    assert rows["samples"] == "| samples | reject 1 | prompts, sft | 1,800 rows | wrong 1,107, cut off 46 |"
    assert rows["sft"] == "| sft | sft 2 | Qwen/Qwen2.5-0.5B@main, trl-lib/Capybara | model |  |"
    order = [name for name in rows if name in ("trl-lib/Capybara", "prompts", "sft", "samples", "pairs")]
    assert order.index("prompts") < order.index("samples") < order.index("pairs")
    assert order.index("trl-lib/Capybara") < order.index("sft") < order.index("samples")
    assert "160 pairs trained on" in page and "- left out: 3 too long\n" in page


def test_no_folder_of_this_machine_stands_in_it(tmp_path: Path) -> None:
    _, page = written(tmp_path, Kind.MODEL, a_run(tmp_path), summary={"start": START})
    assert str(tmp_path) not in page and "secret" not in page


def test_the_curves_are_a_picture_beside_it_that_needs_nothing_else(tmp_path: Path) -> None:
    origins = a_run(tmp_path)
    lines = [{"step": n, "loss": 1 / n, "rewards/chosen": n, "rewards/rejected": -n} for n in range(1, 9)]
    (tmp_path / "dpo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page = written(tmp_path, Kind.MODEL, origins)
    assert "![Curves of the training](curves.svg)" in page
    root = ElementTree.fromstring((tmp_path / "dpo" / "model" / "curves.svg").read_text())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss", "rewards", "chosen", "rejected"} <= set(texts)
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 3
    assert not [value for element in root.iter() for value in element.attrib.values() if "//" in value]


def test_without_curves_there_is_no_picture(tmp_path: Path) -> None:
    _, page = written(tmp_path, Kind.MODEL, a_run(tmp_path))
    assert "curves.svg" not in page
    assert not (tmp_path / "dpo" / "model" / "curves.svg").exists()


def test_a_reward_model_says_where_it_may_be_believed(tmp_path: Path) -> None:
    one = {"groups": 40, "sampled": 0.5, "best_of_n": 0.75, "oracle": 0.9, "pair_accuracy": 0.8, "calibration": None}
    by_family = {
        "math": one | {"gate": {"best_above": 1.25, "worst_below": -2.0, "closed": ""}},
        "tag": one | {"gate": {"best_above": None, "worst_below": None, "closed": "its favourites are | worse"}},
    }
    header, page = written(
        tmp_path, Kind.REWARD_MODEL, a_run(tmp_path), stage="reward 3", summary={"overall": one, "by_family": by_family}
    )
    assert header["pipeline_tag"] == "text-classification" and "reward_model" in header["tags"]
    assert "| math | 40 | 50.0 | 75.0 | 90.0 | 80.0 | 1.25 | -2.00 |" in page
    assert "| tag | 40 | 50.0 | 75.0 | 90.0 | 80.0 | closed | its favourites are \\| worse |" in page
    assert "Not to be believed on: tag" in page
    assert "load_reward_model" in page and "generate(" not in page


def test_held_out_looks_are_told_from_start_to_end(tmp_path: Path) -> None:
    looks = [{"step": 0, "heldout/score": 40.0}, {"step": 5, "heldout/score": 45.0}, {"step": 9, "heldout/score": 51.5}]
    _, page = written(tmp_path, Kind.MODEL, a_run(tmp_path), summary={"heldout": looks})
    assert "| heldout/score, from start to end | 40 → 51.5 |" in page


def test_a_step_of_another_run_is_followed_into_that_run(tmp_path: Path) -> None:
    a_run(tmp_path / "first")
    named = Origin(name="sft", path=str(tmp_path / "first" / "sft" / "model"), fingerprint="sft-print")
    (tmp_path / "first" / "sft" / "model").mkdir()
    found = ancestors_of([named], tmp_path / "second")
    assert [each.name for each in found] == ["Qwen/Qwen2.5-0.5B@main", "trl-lib/Capybara", "sft"]


def test_what_is_a_hub_id_and_what_a_file() -> None:
    assert hub_id("Qwen/Qwen2.5-0.5B@main") == "Qwen/Qwen2.5-0.5B"
    assert hub_id("data/rows.jsonl") is None and hub_id("tiny") is None and hub_id("/a/b") is None
    assert shown("/home/me/rows.jsonl") == "rows.jsonl"
    assert sources_in([{"tiny": {"seed": 1}}, {"source": "a/b"}, "c.jsonl", 3]) == ["the tiny world", "a/b", "c.jsonl"]
