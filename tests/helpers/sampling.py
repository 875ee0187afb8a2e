"""What tests of the `hf` engine share: a random Llama of two layers, requests, and the tokens sampled for them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.types import Request, Sampling

VOCABULARY = 37


def random_llama():
    """Return a model with random weights, large enough that its tokens depend on the context."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def requests(n=24, *, samples=3, new=20, sampling=Sampling(), stop=(1,)):  # noqa: B008
    """Return requests for so many samples of each of n contexts, which are 2 to 14 random tokens long."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for problem in range(n):
        length = int(torch.randint(2, 15, (1,), generator=generator))
        context = tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())
        made += [Request((0, "test", 0, f"p{problem}", k, 0), context, sampling, stop, new) for k in range(samples)]
    return made


def tokens(model, given, **settings):
    """Return the ids and the stop of the action for each request's key."""
    engine = HFEngine(model, pad_id=0, **settings)
    with sampling_mode(model):
        return {action.key: (action.ids, action.stop) for action in engine.generate(given)}
