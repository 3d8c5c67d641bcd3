"""Models in and out of training: adapters on adapters, experts, tied embeddings, stretched positions, QLoRA."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.core.errors import ModelError, RecipeError
from align.core.records import Kind
from align.core.store import ModelRef, Table
from align.export import write
from align.train import models
from align.train.dpo import STAGE as DPO
from align.train.dpo import Config as DPOConfig
from align.train.settings import Speed
from align.train.sft import STAGE as SFT
from align.train.sft import Config
from tests.train import steps
from tests.train.tiny import demonstrations, make_model, make_tokenizer, preferences, save_model

QUICK = {"learning_rate": 1e-2, "epochs": 2.0, "global_batch_size": 8, "max_length": 128}
CPU = Speed(device="cpu", precision="fp32")
IDS = torch.arange(40)[None] * 7 % 300


def inputs(model: Path | str, folder: Path, count: int = 8) -> dict[str, Table | ModelRef]:
    return {
        "model": steps.policy(model),
        "demonstrations": steps.table(folder / "rows.parquet", demonstrations(count)),
    }


def pairs(policy: Path | str, folder: Path, count: int = 8) -> dict[str, Table | ModelRef]:
    return {"policy": steps.policy(policy), "preferences": steps.table(folder / "pairs.parquet", preferences(count))}


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float().log_softmax(-1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy as adapters alone: rank 4 on the base's attention, by SFT."""
    folder = tmp_path_factory.mktemp("lora")
    save_model(folder / "base")
    settings = QUICK | {"lora_rank": 4, "save_merged": False, "lora_targets": ["q_proj", "v_proj"], "lora_alpha": 8.0}
    summary, _ = steps.run(SFT, folder, inputs(folder / "base", folder), settings)
    assert summary["trained"] == "LoRA adapters of rank 4"
    assert (summary["base"], summary["saved"]) == ("base", "adapters of base")
    return folder


def test_a_chain_of_adapters_ends_in_one_adapter_that_equals_the_merged_model(lora: Path, tmp_path: Path) -> None:
    """SFT with LoRA, DPO with other LoRA upon it: saved alone, merged, and merged by export; one model, three ways.

    The second adapters are of rank 2 on all linear layers, so those of the first have none in the MLP.
    """
    settings = QUICK | {"lora_rank": 2}
    alone, _ = steps.run(DPO, tmp_path / "alone", pairs(lora / "model", tmp_path), settings | {"save_merged": False})
    whole, _ = steps.run(DPO, tmp_path / "whole", pairs(lora / "model", tmp_path), settings)
    assert whole["saved"] == "full weights"
    assert alone["saved"] == "adapters of base (those of model and the new ones as one)"
    assert (alone["base"], alone["base_weights"]) == ("model", "base")
    for name in ("alone", "whole"):  # the reference is the SFT policy, though nobody said so
        assert steps.curves(tmp_path / name)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)

    adapters = tmp_path / "alone" / "model"
    stated = json.loads((adapters / "adapter_config.json").read_text())
    assert (stated["r"], stated["base_model_name_or_path"]) == (4 + 2, str((lora / "base").resolve()))
    merged = logps(AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model"))
    base = AutoModelForCausalLM.from_pretrained(lora / "base")
    assert (merged - logps(base)).abs().max() > 0.01
    unmerged = PeftModel.from_pretrained(base, adapters)
    torch.testing.assert_close(logps(unmerged), merged, atol=1e-5, rtol=0)
    torch.testing.assert_close(logps(models.load_policy(steps.policy(adapters), CPU)), merged, atol=1e-5, rtol=0)
    write(ModelRef.find(adapters), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(logps(exported), merged, atol=1e-5, rtol=0)


def test_new_adapters_are_not_laid_upon_ones_that_are_no_plain_lora(lora: Path, tmp_path: Path) -> None:
    """Told before anything is trained; merged they are welcome."""
    folder = tmp_path / "dora"
    folder.mkdir()
    stated = json.loads((lora / "model" / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    with pytest.raises(ModelError, match=r"no plain LoRA \(use_dora\).*save_merged=true"):
        steps.run(SFT, tmp_path, inputs(folder, tmp_path), QUICK | {"lora_rank": 2, "save_merged": False})


def test_an_adapter_does_not_cut_the_rows_that_its_base_has_beyond_the_tokenizer(lora: Path, tmp_path: Path) -> None:
    """Qwen2's embeddings have 271 rows that its tokenizer doesn't know; cut, they no longer fit its config."""
    before = AutoModelForCausalLM.from_pretrained(lora / "base")
    before.resize_token_embeddings(len(make_tokenizer()) + 9)
    before.save_pretrained(tmp_path / "base")
    stated = json.loads((lora / "model" / "adapter_config.json").read_text())
    (tmp_path / "model").mkdir()
    for file in (lora / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    stated["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(stated))
    loaded = models.load_policy(steps.policy(tmp_path / "model"), CPU)
    assert loaded.get_input_embeddings().weight.shape[0] == len(make_tokenizer()) + 9


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings_are_loaded_again_as_they_were_trained(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_model().config
    config.tie_word_embeddings = tied
    t.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trained: list[torch.Tensor] = []
    save = models.save_policy

    def spy(trainer: Any, *rest: Any) -> None:
        trained.append(logps(trainer.model))
        save(trainer, *rest)

    monkeypatch.setattr(models, "save_policy", spy)
    steps.run(SFT, tmp_path, inputs(tmp_path / "base", tmp_path), QUICK)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logps(again), trained[0], atol=1e-6, rtol=0)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert not torch.equal(getattr(again, name)().weight, getattr(before, name)().weight), f"{name}: not trained"
    same = again.get_input_embeddings().weight.data_ptr() == again.get_output_embeddings().weight.data_ptr()
    assert same == tied == again.config.tie_word_embeddings


@pytest.mark.parametrize("stage", [SFT, DPO], ids=["sft", "dpo"])
def test_experts_are_trained_with_the_loss_for_their_balance_that_the_setting_says(stage: Any, tmp_path: Path) -> None:
    """A random router sends every expert about the same, so the loss is about 2, the experts of a token: 10 times 2
    are beside DPO's log 2, and beside SFT's log of the vocabulary's size.

    The model keeps the coefficient of its own config, and asks for no router logits when it is loaded again.
    """
    save_model(tmp_path / "base", "qwen2_moe")
    given = (inputs if stage is SFT else pairs)(tmp_path / "base", tmp_path)
    steps.run(stage, tmp_path, given, QUICK | {"epochs": 1.0, "router_loss_weight": 10.0})
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    own = math.log(2 if stage is DPO else trained.config.vocab_size)
    assert steps.curves(tmp_path)[0]["loss"] == pytest.approx(own + 10 * 2, abs=0.5)
    assert (trained.config.router_aux_loss_coef, trained.config.output_router_logits) == (0.001, False)


def test_yarn_reaches_beyond_the_trained_length_and_stands_in_the_saved_config(tmp_path: Path) -> None:
    """A model of 32 positions learns rows of up to 128 tokens: factor 4, and further 4 upon a model with yarn are 4."""
    model = make_model()
    model.config.max_position_embeddings = 32
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"longest row has \d+ tokens, .* 32 positions .* rope_scaling=yarn"):
        steps.run(SFT, tmp_path / "no", inputs(tmp_path / "base", tmp_path), QUICK)
    steps.run(SFT, tmp_path, inputs(tmp_path / "base", tmp_path), QUICK | {"rope_scaling": "yarn"})
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rope = saved.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32)
    assert (rope["rope_theta"], saved.config.max_position_embeddings) == (
        model.config.rope_parameters["rope_theta"],
        128,
    )
    assert saved.model.rotary_emb.rope_type == "yarn"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=model.config)
    assert not torch.allclose(logps(plain), logps(saved), atol=1e-3), "what is computed differs"
    again = models.load_policy(
        steps.policy(tmp_path / "model"), CPU, Config(rope_scaling="yarn", rope_factor=4.0, max_length=128)
    )
    assert again.config.max_position_embeddings == 128


def test_yarn_is_refused_where_there_is_nothing_to_stretch(tmp_path: Path) -> None:
    yarn = Config(rope_scaling="yarn", max_length=128)
    with pytest.raises(ModelError, match="max_length 128 is within the 256 positions"):
        models.load_policy(steps.policy(save_model(tmp_path / "base")), CPU, yarn)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    t.GPT2LMHeadModel(t.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="gpt2 has no rotary positions"):
        models.load_policy(steps.policy(tmp_path / "gpt2"), CPU, yarn)
    with pytest.raises(
        ModelError, match="the model can tell 32 positions apart; leave longer rows out with max_length=32"
    ):
        models.load_policy(steps.policy(tmp_path / "gpt2"), CPU, Config(max_length=128), longest=33)
    scaled = make_model("llama")
    scaled.config.rope_parameters |= {"rope_type": "linear", "factor": 2.0}
    scaled.save_pretrained(tmp_path / "scaled")
    with pytest.raises(ModelError, match=r"scaled already \(linear\)"):
        models.load_policy(steps.policy(tmp_path / "scaled"), CPU, yarn)


@pytest.mark.parametrize("config", [Config, DPOConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "nf4"}, "without LoRA adapters nothing would be trained; set lora_rank"),
        ({"save_merged": False}, "there are none; set lora_rank"),
        ({"lora_dropout": 0.1}, "no effect"),
        ({"rope_factor": 2.0}, "rope_factor has no effect without rope_scaling"),
        ({"rope_scaling": "yarn", "save_merged": False, "lora_rank": 2}, "positions stand in the model's config"),
        ({"router_loss_weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_weights_in_4_bits_are_refused_where_they_cannot_be(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Config(quantization="nf4", lora_rank=4)
    with pytest.raises(RecipeError, match="needs a CUDA device, and this step runs on cpu"):
        models.load_policy(steps.policy(lora / "base"), CPU, settings)
    with pytest.raises(RecipeError, match=r"model is a LoRA adapter, .*align export"):
        models.load_policy(steps.policy(lora / "model"), Speed(device="cuda", precision="bf16"), settings)
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'align-toolkit\[quantization\]'"):
        models.load_policy(steps.policy(lora / "base"), Speed(device="cuda", precision="bf16"), settings)


def test_what_loads_weights_in_4_bits_is_the_papers_and_what_transformers_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NormalFloat with double quantization, computed in bf16. No GPU is needed to say so; none has run it here."""
    monkeypatch.setattr(models, "find_spec", lambda name: object())
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "0.50.2" if name == "bitsandbytes" else version(name)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    given = models.nf4(Speed(device="cuda", precision="bf16"))
    stated = given["quantization_config"].to_dict()
    assert stated["load_in_4bit"] and not stated["load_in_8bit"]
    assert (stated["bnb_4bit_quant_type"], stated["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert (stated["bnb_4bit_compute_dtype"], given["device_map"]) == ("bfloat16", {"": 0})


def test_adapters_over_quantized_weights_are_merged_into_the_weights_as_they_were(lora: Path) -> None:
    """The way that QLoRA's adapters are saved, on adapters that are at hand."""
    generation = t.GenerationConfig(eos_token_id=[5], max_new_tokens=7)
    base = ModelRef(str(lora / "base"), Kind.MODEL, "base", "0")
    settings = Config(quantization="nf4", lora_rank=4)
    merged = models.merged_on_cpu(lora / "model", base, generation, settings)
    torch.testing.assert_close(logps(merged), logps(models.load_policy(steps.policy(lora / "model"), CPU)))
    assert merged.generation_config.max_new_tokens == 7
    yarn = Config(quantization="nf4", lora_rank=4, rope_scaling="yarn", rope_factor=2.0)
    stretched = models.merged_on_cpu(lora / "model", base, generation, yarn).config
    assert stretched.rope_parameters["rope_type"] == "yarn"
    assert stretched.max_position_embeddings == 2 * merged.config.max_position_embeddings
    assert AutoTokenizer.from_pretrained(lora / "model").chat_template


@pytest.mark.parametrize("below", ["base", "model"])
def test_adapters_over_weights_in_bf16_are_merged_into_the_fp32_weights_on_disk(
    below: str, lora: Path, tmp_path: Path
) -> None:
    """A policy of full weights, and one that is adapters itself. What is written is W + 2 B A (alpha 32 of rank 16),
    W as on disk; bf16 keeps 8 bits, so that W rounded to it is off by up to 0.004 of each weight.
    """
    settings = QUICK | {"epochs": 1.0, "lora_rank": 16, "lora_alpha": 32.0}
    given, speed = inputs(lora / below, tmp_path, 4), {"precision": "bf16"}
    steps.run(SFT, tmp_path / "whole", given, settings, speed)
    steps.run(SFT, tmp_path / "alone", given, settings | {"save_merged": False}, speed)
    adapters = load_file(tmp_path / "alone" / "model" / "adapter_model.safetensors")
    stated = json.loads((tmp_path / "alone" / "model" / "adapter_config.json").read_text())
    assert not (tmp_path / "whole" / "adapters").exists()
    written = steps.weights(tmp_path / "whole")
    changed = 0
    for name, weight in load_file(lora / "base" / "model.safetensors").items():
        above = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{above}.lora_A.weight" in adapters:
            product = adapters[f"{above}.lora_B.weight"] @ adapters[f"{above}.lora_A.weight"]
            expected = weight + stated["lora_alpha"] / stated["r"] * product
            changed += not torch.equal(expected.bfloat16(), weight.bfloat16())
        assert written[name].dtype == torch.float32
        torch.testing.assert_close(written[name], expected, atol=1e-5, rtol=0)
    assert changed == 2 * 7
