"""What the Online Merging Optimizer steers by, from folders; its settings; and trainings that use it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.core.errors import AlignError, ModelError, RecipeError
from align.core.records import Kind
from align.core.store import ModelRef
from align.train import dpo, sft
from align.train.callbacks import Curves
from align.train.health import Displacement
from align.train.merging import Merging, MergingAdamW
from align.train.online_settings import Config as Online
from align.train.online_trainer import OnlineDPO
from align.train.tau import Tau, drift_warnings
from tests.train import steps, tiny
from tests.train.kills import assert_survives_kills

SETTINGS: dict[str, Any] = {"max_length": 128, "global_batch_size": 4, "learning_rate": 1e-3}


def ref(folder: Path | str, name: str = "") -> ModelRef:
    return ModelRef(str(folder), Kind.MODEL, name or Path(folder).name, str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    folder = tmp_path_factory.mktemp("models")
    return {name: ref(tiny.save_model(folder / name, seed=seed)) for seed, name in enumerate(["base", "sft"])}


def assert_is_the_difference(tau: Tau, base: Any, sft: Any) -> None:
    """Of all parameters of two models in memory."""
    tau.check(sft)
    of_base = dict(base.named_parameters())
    for name, parameter in sft.named_parameters():
        torch.testing.assert_close(tau(name), (parameter - of_base[name]).detach(), rtol=0, atol=1e-7)


# --- tau --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_moe"])
def test_tau_is_the_difference_of_the_two_folders(family: str, tmp_path: Path) -> None:
    """Tied and untied embeddings; experts, which lie on disk under other names; one of them in several files."""
    base, taught = tiny.make_model(family), tiny.make_model(family, seed=1)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    taught.save_pretrained(tmp_path / "sft")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert_is_the_difference(Tau(ref(tmp_path / "base"), ref(tmp_path / "sft")), base, taught)


def test_tied_embeddings_are_found_under_either_name(models: dict[str, ModelRef], tmp_path: Path) -> None:
    weights = load_file(Path(models["base"].path) / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    tau = Tau(ref(tmp_path), models["sft"])
    assert_is_the_difference(tau, tiny.make_model(), tiny.make_model(seed=1))


def test_an_adapter_counts_with_its_base(models: dict[str, ModelRef], tmp_path: Path) -> None:
    """tau is then scale * B A on the layers that have adapters, and 0 elsewhere."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models["base"].path)
    adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path)
    tau = Tau(models["base"], ref(tmp_path))
    tau.check(tiny.make_model())
    product = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(tau("model.layers.1.self_attn.q_proj.weight"), product.detach(), atol=1e-6, rtol=1e-5)
    assert not tau("model.layers.1.self_attn.k_proj.weight").any()


def test_a_tied_base_that_is_loaded_whole_gives_both_embeddings_of_an_untied_policy(tmp_path: Path) -> None:
    """Its files are of pickles, so transformers loads it, and it has one weight for two names."""
    from transformers import AutoModelForCausalLM

    base, taught = tiny.make_model(), tiny.make_model(seed=1)
    assert base.config.tie_word_embeddings
    base.config.save_pretrained(tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    taught.save_pretrained(tmp_path / "tied")
    taught.config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(taught.config)
    untied.save_pretrained(tmp_path / "sft")
    tau = Tau(ref(tmp_path / "base"), ref(tmp_path / "sft"))
    tau.check(untied)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = dict(untied.named_parameters())[name] - base.get_input_embeddings().weight
        torch.testing.assert_close(tau(name), wanted.detach(), rtol=0, atol=1e-7)


def test_names_are_found_under_wrappers(models: dict[str, ModelRef]) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = tiny.make_model()
    layer = wrapped.model.layers[0]
    wrapped.model.layers[0] = checkpoint_wrapper(layer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    tau = Tau(models["base"], models["sft"])
    tau.check(wrapped)
    optimizer = MergingAdamW(wrapped.named_parameters(), Merging("onties"), tau)
    layer.mlp.up_proj.weight.grad = torch.zeros_like(layer.mlp.up_proj.weight)
    optimizer.step()


def test_a_base_with_the_same_weights_under_another_name_is_refused(models: dict[str, ModelRef]) -> None:
    copy = ModelRef(models["sft"].path, Kind.MODEL, "copy", "another fingerprint")
    with pytest.raises(ModelError, match="base copy and sft sft have the same weights"):
        Tau(copy, models["sft"]).check(tiny.make_model())


def test_a_base_of_another_shape_or_vocabulary_is_refused(models: dict[str, ModelRef], tmp_path: Path) -> None:
    weights = load_file(Path(models["base"].path) / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        wrong = weights | {name: torch.zeros(60, 32)}
        save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=rf"base old: {name} is 60 × 32 there, and \d+ × 32 in the model that"):
            Tau(ref(tmp_path, "old"), models["sft"]).check(tiny.make_model())


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merging_alpha": 1e-6}, "merging_alpha has no effect without merging"),
        ({"merging_warn_drift": 0.5}, "merging_warn_drift has no effect without merging"),
        ({"merging": "ondare", "lora_rank": 4}, "set lora_rank to 0, or merging_alpha to 0"),
        ({"merging": "onties", "lora_rank": 4, "quantization": "nf4"}, "set merging or quantization to none"),
        ({"merging": "onties", "merging_keep": 0.0}, "greater than 0"),
        ({"merging": "onties", "merging_alpha": 1.0}, "less than 1"),
        (
            {"merging": "ondare", "merging_alpha": 0.0, "merging_warn_drift": 0.1},
            "warn_drift has no effect with merging_",
        ),
        ({"merging": "onties", "merging_alpha": 0.0, "merging_as_in": "paper"}, "merging_as_in: paper has no effect"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo.Config(**settings)


@pytest.mark.parametrize(
    ("merging", "given", "error", "message"),
    [
        ({"merging": "ondare"}, [], RecipeError, "no base was given; give the model that SFT started from as base"),
        ({}, ["base", "sft"], RecipeError, "base and sft: has no effect, since merging is none; leave it out"),
        ({"merging": "onties", "merging_alpha": 0.0}, ["base"], RecipeError, "since merging_alpha is 0"),
        ({"merging": "ondare"}, ["sft as base"], ModelError, "are one model, so SFT has changed nothing to steer by"),
    ],
)
def test_models_that_are_missing_or_idle_are_refused_before_anything_loads(
    merging: dict[str, Any],
    given: list[str],
    error: type[AlignError],
    message: str,
    models: dict[str, ModelRef],
    tmp_path: Path,
) -> None:
    table = steps.table(tmp_path / "pairs.parquet", tiny.preferences(4))
    inputs: dict[str, Any] = {"policy": models["sft"], "preferences": table}
    for name in given:
        inputs[name.split()[-1]] = models[name.split()[0]]
    with pytest.raises(error, match=message):
        steps.run(dpo.STAGE, tmp_path / "run", inputs, SETTINGS | merging)


def test_a_drift_that_is_too_large_is_told_beforehand() -> None:
    """alpha 5e-5 over 950 steps, which the paper found to hurt, is 0.0475 of tau; every 10 steps a tenth of it."""
    told = drift_warnings(dpo.Config(merging="ondare", merging_alpha=5e-5), 950)
    assert len(told) == 1
    assert "adds 0.048 of tau to the weights in 950 merges, more than merging_warn_drift 0.02" in told[0]
    assert "lower it to 2e-05" in told[0]
    for steps_, most in ((950, 2e-5), (700, 2e-5), (210, 9e-5), (200, 1e-4), (2000, 1e-5)):  # 0.02 / 700 is 2.9e-5
        assert f"lower it to {most:.1g}," in drift_warnings(dpo.Config(merging="ondare", merging_alpha=1e-2), steps_)[0]
        assert not drift_warnings(dpo.Config(merging="ondare", merging_alpha=most), steps_)
    assert not drift_warnings(dpo.Config(merging="ondare", merging_alpha=5e-5, merging_every=10), 950)
    assert not drift_warnings(dpo.Config(merging="ondare"), 950)
    assert not drift_warnings(dpo.Config(), 950)


# --- trainings --------------------------------------------------------------------------------------------------------


def test_a_killed_sft_goes_on_to_the_same_weights(models: dict[str, ModelRef], tmp_path: Path) -> None:
    """Five steps, merged every two: killed with one step gathered, and again in the one that `finish` merges."""
    table = steps.table(tmp_path / "demonstrations.parquet", tiny.demonstrations(20))
    inputs = {"model": models["sft"], "demonstrations": table, "base": models["base"]}
    settings = SETTINGS | {"epochs": 1.0, "merging": "onties", "merging_every": 2, "merging_alpha": 1e-3}
    summary = assert_survives_kills(sft.STAGE, tmp_path / "runs", inputs, settings, at=[4])
    assert summary["merging_drift"] == pytest.approx(3e-3)
    assert "OnTIES (the code's variant, alpha 0.001, keep 0.01, every 2 steps) of AdamW" in summary["optimizer"]
    assert "warnings" not in summary


def test_the_last_look_and_the_last_checkpoint_are_of_the_weights_that_are_written(
    models: dict[str, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps, merged every two, so that the rest is merged at the end; and a kill between the end and the file."""
    table = steps.table(tmp_path / "demonstrations.parquet", tiny.demonstrations(20))
    inputs = {"model": models["sft"], "demonstrations": table, "base": models["base"]}
    settings = SETTINGS | {"epochs": 1.0, "merging": "ondare", "merging_every": 2, "merging_alpha": 1e-3}
    name, seen = "model.layers.0.mlp.up_proj.weight", {}
    log = Curves.on_log

    def look(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        seen[state.global_step] = dict(self.trainer.model.named_parameters())[name].detach().clone()
        log(self, args, state, control, logs, **kwargs)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Curves, "on_log", look)
        patch.setattr("align.train.models.save_policy", killed)
        with pytest.raises(KeyboardInterrupt):
            steps.run(sft.STAGE, tmp_path / "run", inputs, settings, {"save_every": 1})
    summary, _ = steps.run(sft.STAGE, tmp_path / "run", inputs, settings, {"save_every": 1})
    assert torch.equal(steps.weights(tmp_path / "run")[name], seen[5])
    assert summary["merging_drift"] == pytest.approx(3e-3)


def test_where_a_run_may_be_stopped_weights_are_kept_after_merges_alone() -> None:
    """At a twentieth of 100 steps, 5, and where three are merged at once at 6; of 10 steps at every third."""
    for every, count, apart in ((1, 100, 5), (3, 100, 6), (3, 10, 3), (1, 10, 1)):
        watched: Any = SimpleNamespace(
            settings=dpo.Config(merging="ondare", merging_every=every), tools=SimpleNamespace(work=Path())
        )
        assert Displacement(watched, 1.0, 1.0)._apart(count) == apart


def test_an_episode_ends_with_a_merge_before_it_is_kept_and_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("merge_the_rest", "_keep_state", "_write_border"):
        monkeypatch.setattr(OnlineDPO, name, lambda _, name=name: done.append(name))
    monkeypatch.setattr(OnlineDPO, "_objections", lambda *_: done.append("look") or [])
    online: Any = OnlineDPO.__new__(OnlineDPO)
    online.settings, online.curves = Online(episodes=1), SimpleNamespace(lines=[])
    online.record, online.records, online.opened = {"seconds": {}}, [], 0.0
    online.episode, online.ahead, online.steps_before, online.began_at = 0, None, 0, 0
    online.state = SimpleNamespace(global_step=3)
    online.tools = SimpleNamespace(progress=steps.Silent())
    online._close_episode()
    assert done == ["merge_the_rest", "_keep_state", "look", "_write_border"]


def test_dpo_says_what_merges_and_moves_the_weights_towards_sft(models: dict[str, ModelRef], tmp_path: Path) -> None:
    """With a learning rate of next to nothing, OnTIES's alpha 0.1 adds four times 0.1 of the largest tenth of tau."""
    table = steps.table(tmp_path / "pairs.parquet", tiny.preferences(16))
    inputs = {"policy": models["sft"], "preferences": table, "base": models["base"]}
    settings = SETTINGS | {"merging": "onties", "merging_alpha": 0.1, "merging_keep": 0.1, "learning_rate": 1e-12}
    summary, said = steps.run(dpo.STAGE, tmp_path / "run", inputs, settings)
    start = "\n".join(said.said)
    assert "OnTIES (the code's variant, alpha 0.1, keep 0.1) of AdamW" in start
    assert "adds 0.4 of tau to the weights in 4 merges" in " ".join(start.split())
    assert summary["warnings"] == drift_warnings(dpo.Config(**settings), 4)
    after = steps.weights(tmp_path / "run")
    taught, base = (load_file(Path(models[name].path) / "model.safetensors") for name in ("sft", "base"))
    name = "model.layers.0.mlp.up_proj.weight"
    tau = taught[name] - base[name]
    kept = tau.abs() >= tau.abs().flatten().kthvalue(tau.numel() - round(0.1 * tau.numel()) + 1).values
    torch.testing.assert_close(after[name], taught[name] + 0.4 * tau * kept, atol=1e-6, rtol=1e-5)


def test_dpo_with_all_kept_and_no_tau_is_adamw_s(models: dict[str, ModelRef], tmp_path: Path) -> None:
    table = steps.table(tmp_path / "pairs.parquet", tiny.preferences(8))
    inputs = {"policy": models["sft"], "preferences": table}
    for name, merging in (("adamw", {}), ("off", {"merging": "ondare", "merging_alpha": 0.0, "merging_keep": 1.0})):
        steps.run(dpo.STAGE, tmp_path / name, inputs, SETTINGS | {"weight_decay": 0.1} | merging)
    ours, theirs = steps.weights(tmp_path / "off"), steps.weights(tmp_path / "adamw")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
