"""The shipped tiny model as a GGUF file, for llama.cpp's server: `python tests/core/engines/tiny_gguf.py FILE`.

Needs the packages gguf and numpy only, so it runs in an environment without torch too. A Qwen2 model needs no change of
its weights: llama.cpp turns halves of a head's vector against each other, as transformers does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BASE = Path(__file__).parents[3] / "align" / "tiny" / "base"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main(path: str) -> None:
    config = json.loads((BASE / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, config)
    for name, values in weights():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    made = json.loads((BASE / "tokenizer.json").read_text())
    by_id = {number: text for text, number in made["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in made["added_tokens"]}
    tokens = [special.get(number, by_id.get(number, f"[unused{number}]")) for number in range(config["vocab_size"])]
    kinds = [gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL for n in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # the same pattern
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((BASE / "chat_template.jinja").read_text())


def weights() -> list[tuple[str, np.ndarray[Any, Any]]]:
    """The weights under llama.cpp's names, as float32; bfloat16 is the upper half of it."""
    data = (BASE / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = []
    for name, about in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        start, end = (8 + size + at for at in about["data_offsets"])
        assert about["dtype"] == "BF16", about
        upper = np.frombuffer(data[start:end], "<u2").astype(np.uint32) << 16
        found.append((_renamed(name), upper.view(np.float32).reshape(about["shape"])))
    return found


def _renamed(name: str) -> str:
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[part]}.{kind}"


if __name__ == "__main__":
    main(sys.argv[1])
