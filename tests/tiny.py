"""Small real things for tests: a byte-level BPE with TRL's Llama-3.2 template, a random Llama, recipes as mappings."""

import importlib.util
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

LLAMA_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]  # fmt: skip


def llama_template() -> str:
    """Return the Llama-3.2 template as TRL ships it, without importing trl."""
    package = Path(importlib.util.find_spec("trl").origin).parent
    return (package / "chat_templates" / "llama3_2.jinja").read_text(encoding="utf-8")


def llama_tokenizer(texts, *, vocabulary=600, chat=True):
    """Train a byte-level BPE with Llama-3's control tokens on the texts."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=LLAMA_SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>" if chat else "<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    if chat:
        tokenizer.chat_template = llama_template()
    return tokenizer


def save_llama(directory, tokenizer, *, hidden=32, layers=2, positions=512, seed=0):
    """Save a random two-layer Llama with its tokenizer; return the directory as text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_jsonl(path, rows):
    """Write rows as JSON lines; return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k(path):
    """Return the rows of a GSM8K file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
