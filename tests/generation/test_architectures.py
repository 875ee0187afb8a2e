"""Every kind of cache: models that the engine samples as transformers' `generate` does, and models refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from bcft.errors import UsageError
from bcft.generation.hf import HFEngine
from bcft.generation.kv_cache import cached_numbers_per_token
from bcft.generation.mode import sampling_mode
from bcft.policy.shape import check_engine, context_length
from bcft.types import Request, Sampling

VOCABULARY = 64
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
COMMON = IDS | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 80,
}  # fmt: skip
GPT2 = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
WINDOW = {"sliding_window": 8, "head_dim": 8}

EQUAL = {
    "llama": ("llama", {}),
    "bloom, which has no positions": ("bloom", IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", IDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 80}),
    "deepseek_v3, keys wider than values": ("deepseek_v3", LATENT),
    "mistral with a sliding window": ("mistral", {"sliding_window": 8}),
    "qwen3_5_text, linear attention": ("qwen3_5_text", LINEAR),
    "lfm2, convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}
"""A few of each kind, in the fast tests."""
ALSO_EQUAL = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "qwen3_next": ("qwen3_next", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
    "granite": ("granite", {}),
    "cohere2": ("cohere2", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", WINDOW),
    "gemma3_text": ("gemma3_text", {**WINDOW, "num_hidden_layers": 6}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", GPT2),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "falcon": ("falcon", {}),
    "falcon with ALiBi": ("falcon", {"alibi": True, "multi_query": False}),
    "gpt_oss": ("gpt_oss", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        "llama4_text",
        {
            "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
            "attention_chunk_size": 8, "num_hidden_layers": 4,
        },
    ),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "falcon_h1": (
        "falcon_h1",
        {
            "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
            "mamba_n_groups": 1, "mamba_expand": 1,
        },
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "nemotron_h": (
        "nemotron_h",
        {
            "head_dim": 8, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8,
            "n_groups": 1, "ssm_state_size": 8,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
            "shared_intermediate_size": 16,
        },
    ),
}  # fmt: skip
REFUSED = {
    "mamba": ({"num_hidden_layers": 2}, "takes no `past_key_values`"),
    "mamba2": ({"num_hidden_layers": 2}, "takes no `past_key_values`"),
    "falcon_mamba": ({"num_hidden_layers": 2}, "takes no `past_key_values`"),
    "openai-gpt": ({}, "takes no `past_key_values`"),
    "rwkv": ({}, "takes no `past_key_values`|keeps a state of its own"),
    "xlstm": ({}, "takes no `past_key_values`|keeps a state of its own"),
    "minimax": ({}, "keeps a state of its own"),
    "recurrent_gemma": ({}, "does not mask padded tokens"),
    "deepseek_v32": ({}, "caches what the engine cannot share"),
    "llama4_text": ({"attention_chunk_size": None}, "transformers makes no cache for its configuration"),
    "bert": ({}, "has an encoder"),
    "t5": ({}, "not a causal language model"),
    "clip": ({}, "not a causal language model"),
}


def built(kind, values):
    """Return a model with random weights, large enough that its tokens depend on the context."""
    needed = values if "vocab_size" in values else COMMON | values
    config = AutoConfig.for_model(kind, **needed)
    check_engine(kind, config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(0, 0.3)
    return model


def greedy(model, context, new):
    ids = torch.tensor([context])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=[1], pad_token_id=0
    )
    return made[0, len(context) :].tolist()


def two_turns(kind, values):
    """Compare two turns of nine conversations of different lengths, at most four at a time."""
    model = built(kind, values)
    engine = HFEngine(model, pad_id=0, rows=4, keep_sessions=True)
    generator = torch.Generator().manual_seed(1)

    def draw(most):
        length = int(torch.randint(2, most, (1,), generator=generator))
        return tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())

    contexts, distinct = {("s", i): draw(18) for i in range(9)}, set()
    for turn in range(2):
        given = [
            Request((0, "test", 0, f"p{key[1]}", 0, turn), context, Sampling(temperature=0.0), (1,), 12, session=key)
            for key, context in contexts.items()
        ]
        with sampling_mode(model):
            made = {action.key: action.ids for action in engine.generate(given)}
        for request in given:
            theirs = greedy(model, request.context_ids, 12)
            assert list(made[request.key]) == theirs, (kind, turn, len(request.context_ids))
            distinct.update(theirs)
            contexts[request.session] = (*request.context_ids, *theirs, *draw(8))
    assert len(distinct) > 5


@pytest.mark.parametrize("name", EQUAL)
def test_the_engine_samples_what_generate_does_whatever_the_cache_holds(name):
    two_turns(*EQUAL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALSO_EQUAL)
def test_the_engine_samples_what_generate_does_with_other_architectures(name):
    two_turns(*ALSO_EQUAL[name])


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_the_engine_cannot_sample_is_refused_by_name_with_what_to_use(kind):
    values, reason = REFUSED[kind]
    with pytest.raises(UsageError, match=rf"^model_name_or_path: 'some/model' \({kind}\).*({reason})") as caught:
        check_engine("some/model", AutoConfig.for_model(kind, **values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        ("bloom", {"seq_length": 77}, 77),
        ("bloom", {}, 2048),
        ("gemma3", {"text_config": {"max_position_embeddings": 77}}, 77),
    ],
)
def test_the_context_is_what_the_configuration_says_in_its_own_words(kind, values, expected):
    assert context_length(AutoConfig.for_model(kind, **values)) == expected


@pytest.mark.parametrize("name", ["llama", "deepseek_v3, keys wider than values"])
def test_the_memory_of_a_token_is_that_of_the_cache_that_holds_it(name):
    model = built(*EQUAL[name])
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[2, 3, 4]]), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cached_numbers_per_token(model.config) == held / 3
