"""What only a GPU shows: attention in torch's kernel for rows of unlike length, training in bf16, 4-bit weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM as Auto
from transformers import AutoTokenizer, MistralConfig, PreTrainedModel, Qwen2Config

from align.core import segments
from align.core.engines.base import SamplingParams
from align.core.segments import Branch, Tree, by_branch, can_be_flat, collate, model_inputs
from align.core.store import ModelRef
from align.stages import load
from align.train.head import score_labelled_only
from align.train.samplers import Live
from tests.train import steps, tiny
from tests.train.test_online_dpo import QUICK, prompts, trained

__all__ = ["trained"]  # its fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SMALL = {
    "vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def trees() -> list[Tree]:
    """Eight prompts of 5 to 60 tokens with one to three completions of 3 to 80."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(5, 500, (length,), generator=generator).tolist()

    return [Tree(ids(5, 60), [Branch(ids(3, 80)) for _ in range(1 + number % 3)]) for number in range(8)]


def scored(model: PreTrainedModel, flat: bool, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities per token of each branch, and the gradient of their mean as one vector."""
    batch = collate(trees(), flat)
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in model_inputs(batch).items()}
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        log_probs = model(**given, fused_lm_head=True).log_probs.float()
    branch = batch["branch"].cuda()
    counted = (batch["shift_labels"].cuda() != segments.IGNORED).float()
    count = int(branch.max()) + 1
    means = by_branch(log_probs, branch, count) / by_branch(counted, branch, count)
    means.mean().backward()
    return means.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "config",
    [Qwen2Config(**SMALL, tie_word_embeddings=True), MistralConfig(**SMALL, sliding_window=16)],
    ids=["qwen2", "sliding window"],
)
def test_flat_rows_in_the_kernel_give_what_padded_rows_give(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 to rounding; in bf16, where the kernel is, to bf16's: 8 bits, a few thousandths of a nat a token."""
    kernel, calls = segments._varlen_kernel(), []
    assert kernel is not None, "this torch has no attention over rows of unlike length"

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(segments, "_varlen_kernel", lambda: counted)
    torch.manual_seed(0)
    model = Auto.from_config(config).cuda().train()
    assert score_labelled_only(model)
    expected, gradient = scored(model, flat=False, bf16=False)
    assert can_be_flat(model, "bf16")
    exact, also = scored(model, flat=True, bf16=False)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    assert (also - gradient).norm() < 1e-3 * gradient.norm()
    calls.clear()
    found, rounded = scored(model, flat=True, bf16=True)
    assert len(calls) == config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    assert torch.cosine_similarity(rounded, gradient, dim=0) > 0.99


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_a_stage_learns_in_bf16_and_starts_where_it_should(tmp_path: Path, verb: str) -> None:
    """DPO's first loss is log 2, since policy and reference are one model; the stage itself checks the margins."""
    model = steps.policy(tiny.save_model(tmp_path / "base"))
    if verb == "sft":
        inputs: dict[str, Any] = {"model": model}
        inputs["demonstrations"] = steps.table(tmp_path / "d.parquet", tiny.demonstrations(64))
    else:
        inputs = {"policy": model, "preferences": steps.table(tmp_path / "p.parquet", tiny.preferences(64))}
    settings = {"learning_rate": 1e-2, "epochs": 4.0, "global_batch_size": 16, "max_length": 200}
    steps.run(load(verb), tmp_path / "out", inputs, settings, {"device": "cuda"})
    losses = [line["loss"] for line in steps.curves(tmp_path / "out") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    if verb == "dpo":
        assert losses[0] == pytest.approx(0.6931, abs=0.01)


def test_an_online_run_samples_on_the_gpu_in_the_training_s_precision(trained: Path, tmp_path: Path) -> None:
    """The embedded decoder's products are in bf16 as the training's are, so the gap is bf16's, some thousandths."""
    given = {"policy": steps.policy(trained), "prompts": steps.table(tmp_path / "prompts.parquet", prompts(30))}
    settings = QUICK | {"max_sampler_gap": 0.03, "prompts_per_episode": 16}
    summary, _ = steps.run(load("online-dpo"), tmp_path / "online", given, settings, {"device": "cuda"})
    assert summary["pairs"] > 0 and summary["steps"] > 0
    gaps = [line["heldout/gap"] for line in steps.curves(tmp_path / "online") if "heldout/gap" in line]
    assert len(gaps) == 3 and 0 < max(gaps) < 0.03
    model: Any = Auto.from_pretrained(trained).cuda()
    sampler = Live(model, AutoTokenizer.from_pretrained(trained), "bf16")
    done = list(sampler.sample([[1, 2, 3]] * 64, 4, SamplingParams(max_tokens=40, logprobs=True)))
    assert len(done) == 256 and {completion.finish_reason for *_, completion in done} <= {"stop", "length"}
    assert sampler.engine._quick is not None and sampler.engine._quick.head.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_a_merging_step_on_the_gpu_is_the_cpu_s(tmp_path: Path, method: str) -> None:
    """One step in fp32 from the same weights, gradient and tau; every coordinate is kept, so nothing is drawn."""
    base, sft = (steps.policy(tiny.save_model(tmp_path / name, seed=seed)) for seed, name in enumerate(("base", "sft")))
    given = {"policy": sft, "preferences": steps.table(tmp_path / "p.parquet", tiny.preferences(8))}
    given |= {"base": ModelRef(base.path, base.kind, "base", "1")}
    settings = {"learning_rate": 1e-3, "epochs": 1.0, "global_batch_size": 8, "max_length": 200, "merging": method}
    settings |= {"merging_alpha": 1e-3, "merging_keep": 1.0, "merging_warn_drift": 1.0}
    found = []
    for device in ("cpu", "cuda"):
        steps.run(load("dpo"), tmp_path / device, given, settings, {"device": device, "precision": "fp32"})
        found.append(steps.weights(tmp_path / device))
    start = load_file(f"{sft.path}/model.safetensors")
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).abs().mean() < 0.05 * (tensor - start[name]).abs().mean(), name


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed")
def test_adapters_train_on_a_base_of_4_bits(tmp_path: Path) -> None:
    inputs = {
        "model": steps.policy(tiny.save_model(tmp_path / "base")),
        "demonstrations": steps.table(tmp_path / "d.parquet", tiny.demonstrations(64)),
    }
    settings = {
        "learning_rate": 1e-2, "epochs": 4.0, "global_batch_size": 16, "max_length": 200, "quantization": "nf4",
        "lora_rank": 8,
    }  # fmt: skip
    steps.run(load("sft"), tmp_path / "out", inputs, settings, {"device": "cuda"})
    losses = [line["loss"] for line in steps.curves(tmp_path / "out") if "loss" in line]
    assert losses[-1] < losses[0]
