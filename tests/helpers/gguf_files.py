"""GGUF files of saved Llama models, written with gguf's own writer, and packages that hold one."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(directory, path, *, kind="F32", architecture="llama"):
    """Write the Llama model of a directory as a GGUF file; return the path as text."""
    import gguf

    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("a name")
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict().items():
        numbers = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            numbers = _interleaved(numbers, config.head_dim)
        if kind == "F32" or numbers.ndim == 1:
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(numbers))
        else:
            quantized = gguf.quants.quantize(np.ascontiguousarray(numbers), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(_gguf_name(name), quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def make_package(directory, name, monkeypatch):
    """Make a package that must not be imported, and put it on Python's path; return its directory."""
    place = Path(directory) / name
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('this package was imported')")
    monkeypatch.syspath_prepend(str(directory))
    return place


def _add_tokenizer(writer, tokenizer):
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {str(token) for token in tokenizer.all_special_tokens} | set(tokenizer.get_added_vocab())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name):
    stem, _, end = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{end}"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{LAYER[rest]}.{end}"


def _interleaved(numbers, width):
    """Return the rows of each head in llama.cpp's order, whose rotary embedding pairs neighbors."""
    heads = len(numbers) // width
    return numbers.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(numbers.shape)
