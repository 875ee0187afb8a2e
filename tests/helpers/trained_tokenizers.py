"""Chat templates, and small tokenizers of the kinds that models have with the special tokens of a template.

`bytes`: byte-level BPE (Llama 3, Qwen). `first`: SentencePiece that puts a space before a text (Mistral v0.3).
`legacy`: one that puts a space before a text and after every special token (Llama 2, Mistral v0.1, Phi 3). `bare`:
SentencePiece without that space, with line breaks that merge (Gemma). `character`: one token a character.
"""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bcft.policy.chat_template import Renderer

TRL = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(importlib.util.find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))
}
OTHERS = {
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral_v03": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% elif m.role == 'user' %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}"
    ),
    "smollm2": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""Templates of models that TRL has none for."""
TEMPLATES = TRL | OTHERS

KINDS = ("bytes", "first", "legacy", "bare", "character")
_SPECIAL = re.compile(
    r"<\|[\w ]+\|>|<｜[^｜<]+｜>|<(?:start|end)_of_\w+>|<\|(?:turn|tool|channel|image|think|audio)>"
    r"|<(?:turn|channel)\|>|\[gMASK\]|<sop>|\[/?INST\]"
)
_TEXTS = [
    "What is 6*7+1? It is 43. Then 40 + 3 is 43, and x is 7.\n\n",
    "<think>\nfirst x, then y\n</think>\n\nBe brief. The answer is 12.\n",
    "user assistant system model\nHi! And what follows? Say it again.\n\n",
    "<|user|>\n<|assistant|>\n[INST] Say [/INST] Current date: 2024\n",
]


@cache
def _backend(kind):
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        _train(backend, _TEXTS, initial_alphabet=alphabet)
        return backend.to_str()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    _train(backend, _TEXTS if kind == "bare" else [text.replace("\n", " ") for text in _TEXTS])
    trained = json.loads(backend.to_str())["model"]
    alphabet = {chr(i) for i in range(33, 127)} | {"▁"} | ({"\n"} if kind == "bare" else set())
    merges = [tuple(pair) for pair in trained["merges"]] if kind != "character" else []
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(alphabet), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if kind in ("first", "legacy") else steps)
    return backend.to_str()


def _train(backend, texts, **options):
    backend.train_from_iterator(texts * 3, trainers.BpeTrainer(vocab_size=420, show_progress=False, **options))


def tokenizer(kind, template, *, bos="<s>", eos="</s>"):
    """Return a tokenizer of a kind with a chat template and all special tokens that the template writes."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)), bos_token=bos, eos_token=eos, unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(template)) - {bos, eos})})
    made.chat_template = template
    return made


@cache
def renderer_of(name, kind):
    """Return the renderer of a template with a kind of tokenizer."""
    return Renderer(tokenizer(kind, TEMPLATES[name], bos="<|im_start|>" if name == "smollm2" else "<s>"))


def user(text):
    """Return a user's message."""
    return {"role": "user", "content": text}


def reply(text):
    """Return an assistant's message."""
    return {"role": "assistant", "content": text}
