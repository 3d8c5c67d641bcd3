"""Sequence classifiers that were made elsewhere: decoders and encoders, with their own formats, pads and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from align.core.errors import DataError, ModelError
from reward.model import load_reward_model
from tests.reward.test_model import ITEMS, asked, said
from tests.train.tiny import make_tokenizer

SHAPES: dict[str, Any] = {
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "gemma": (GemmaConfig, GemmaForSequenceClassification),
}


def save_decoder(folder: Path, family: str = "qwen2", outputs: int = 1, pad: str | None = "eos") -> Path:
    """A random classifier as the Hub has them: no card of ours; its pad token its end token, its own, or none."""
    import copy

    tokenizer = copy.deepcopy(make_tokenizer(family))
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    configuration, build = SHAPES[family]
    torch.manual_seed(3)
    config = configuration(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, num_labels=outputs,
        pad_token_id=None if pad is None else tokenizer.pad_token_id,
    )  # fmt: skip
    build(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path, template: str | None = None) -> Path:
    """A random BERT of one output that reads words, with token types."""
    words = "what is 3 plus 4 ? the answer 7 . yes no [PAD] [UNK] [CLS] [SEP]".split()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words.index(token)) for token in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.chat_template = template
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, num_labels=1, pad_token_id=words.index("[PAD]"), initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "pad"), [("qwen2", "eos"), ("llama", "own"), ("gemma", None), ("gemma", "eos")])
def test_a_decoder_scores_as_its_own_code_does_one_by_one_and_padded_on_the_left(
    tmp_path: Path, family: str, pad: str | None
) -> None:
    """Its own forward on single renderings, unpadded; and where it has a pad token, on a batch padded on the left.

    With the pad token the end token it reads the token before the end, here as there.
    """
    judge = load_reward_model(save_decoder(tmp_path, family, pad=pad))
    judge.tokenizer.padding_side = "left"
    model = SHAPES[family][1].from_pretrained(tmp_path).eval()
    texts = [judge.tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in ITEMS]
    single = [judge.tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
    with torch.no_grad():
        alone = [float(model(**ids).logits) for ids in single]
    assert judge.score_many(ITEMS) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 6) for score in alone}) == 4
    if pad is not None:
        batch = judge.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        assert int(batch["attention_mask"][1, 0]) == 0, "padded on the left"
        with torch.no_grad():
            together = model(**batch).logits[:, 0].tolist()
        assert judge.score_many(ITEMS) == pytest.approx(together, abs=1e-4)


def test_an_encoder_reads_prompt_and_answer_as_a_pair_with_token_types(tmp_path: Path) -> None:
    items = [
        (asked("what is 3 plus 4 ?"), said("the answer is 7 .")),
        (asked("what ?"), said("yes")),
        (asked("what is 3 plus 4 ?"), said("no")),
    ]
    judge = load_reward_model(save_bert(tmp_path))
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for prompt, completion in items:
        pair = judge.tokenizer(prompt[0]["content"], completion[0]["content"], return_tensors="pt")
        types = torch.zeros_like(pair["input_ids"])
        types[0, pair["input_ids"][0].tolist().index(judge.tokenizer.sep_token_id) + 1 :] = 1
        with torch.no_grad():
            expected.append(float(model(input_ids=pair["input_ids"], token_type_ids=types).logits))
            plain = float(model(input_ids=pair["input_ids"], token_type_ids=torch.zeros_like(types)).logits)
        assert plain != pytest.approx(expected[-1], abs=1e-3)
    assert judge.score_many(items) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_refuses_dialogues_unless_it_has_a_template_and_has_no_score_for_long_texts(tmp_path: Path) -> None:
    dialogue = [*asked("what ?"), *said("yes"), *asked("what is 3 ?")]
    judge = load_reward_model(save_bert(tmp_path / "plain"))
    with pytest.raises(DataError, match="one question and one answer"):
        judge.score_many([(dialogue, said("7"))])
    long: Any = (asked("what"), said("7 " * 60))
    assert judge.score_fitting([(asked("what"), said("7")), long])[1] is None
    with pytest.raises(DataError, match="reads 40 at most"):
        judge.score_many([long])
    template = "[CLS] {% for m in messages %}{{ m['content'] }} [SEP] {% endfor %}"
    templated = load_reward_model(save_bert(tmp_path / "templated", template))
    assert len(templated.score_many([(dialogue, said("7"))])) == 1


def test_one_output_of_several_is_chosen_and_none_is_guessed(tmp_path: Path) -> None:
    save_decoder(tmp_path, outputs=3)
    model = Qwen2ForSequenceClassification.from_pretrained(tmp_path).eval()
    with pytest.raises(ModelError, match=r"3 outputs.*align ensemble reward_model=.* output=0"):
        load_reward_model(tmp_path)
    with pytest.raises(ModelError, match="output 3 was asked for, it has 3"):
        load_reward_model(tmp_path, output=3)
    text = make_tokenizer().apply_chat_template(ITEMS[0][0] + ITEMS[0][1], tokenize=False)
    ids = make_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[0]
    for output in range(3):
        score = load_reward_model(tmp_path, output=output).score_many(ITEMS[:1])[0]
        assert score == pytest.approx(float(expected[output]), abs=1e-5)


def test_a_fresh_encoder_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save_bert(tmp_path) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "classifier" not in k}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"classifier.*random"):
        load_reward_model(tmp_path)


def test_ids_of_a_policy_are_read_only_by_a_model_that_was_trained_on_such(tmp_path: Path) -> None:
    """A model made elsewhere may read the newline after the end of the turn, which sampled ids lack."""
    from tests.reward.test_model import save_scalar

    ours = load_reward_model(save_scalar(tmp_path / "ours"))
    theirs = load_reward_model(save_decoder(tmp_path / "theirs", pad="own"))
    assert ours.reads_ids_of(make_tokenizer())
    assert not ours.reads_ids_of(make_tokenizer("llama"))
    assert not theirs.reads_ids_of(make_tokenizer())
