"""Whether a server plays the policy that is trained: what it can hold, a probe, and log-probabilities side by side.

The policy's own figures are those of its training precision; of what both compute, only the last bits may differ.
"""

import random
from collections.abc import Iterable, Sequence
from hashlib import sha256

import torch

from bcft.errors import FaultError, MismatchError, UsageError
from bcft.generation.mode import sampling_mode
from bcft.generation.vllm.client import Client, Refused
from bcft.generation.vllm.requests import ask, completed
from bcft.policy.loading import Policy
from bcft.types import Action, Request, Sampling

MOST_DIFFERENCE = 1e-2
"""Nats, on average over tokens, by which log-probabilities in fp32 on a CPU may differ; 1e-4 is usual."""
_OTHER_MODEL = 0.3
"""The same in any precision, over the tokens of the probe: in bf16 one policy is within 0.1 of itself."""
_COMPARED_ACTIONS = 32
_COMPARED_TOKENS = 4096
"""At most so many actions of a rollout are compared, and so many tokens, contexts counted in."""
_PROBE = "What is 17 + 25?"
_PROBE_TOKENS = 8
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the most that an adapter's rank may be."""


@torch.no_grad()
def fingerprint(policy: Policy, *, base: bool = False) -> str:
    """Return a hash of what a policy has beyond its frozen base, from a sum of every tensor: training changes one.

    base: of an adapter's base instead, '' for full weights.
    """
    if base and not policy.adapter:
        return ""
    named = policy.model.named_parameters()
    sums = [
        f"{name} {float(tensor.detach().sum(dtype=torch.float64)):.9e}"
        for name, tensor in named
        if not policy.adapter or ("lora_" in name) != base
    ]
    return sha256("\n".join(sums).encode()).hexdigest()[:12]


def check_adapter(policy: Policy) -> None:
    """Raise UsageError for an adapter that vLLM does not load: it takes plain LoRA only."""
    for config in policy.model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise UsageError(f"engine: vllm loads LoRA adapters, and this one is {kind}: use engine: hf")
        if getattr(config, "use_dora", False):
            raise UsageError("use_dora: vLLM does not load DoRA adapters: leave use_dora out, or use engine: hf")
        if saved := sorted(config.modules_to_save or ()):
            raise UsageError(
                f"lora_modules_to_save: vLLM loads no adapter that holds whole modules ({', '.join(saved)}): leave "
                f"lora_modules_to_save out, or use engine: hf"
            )


def largest_rank(policy: Policy) -> int:
    """Return the least of what vLLM takes as `--max-lora-rank` that holds the adapter. Raises UsageError for none."""
    ranks = [r for c in policy.model.peft_config.values() for r in (c.r, *(c.rank_pattern or {}).values())]
    for rank in _RANKS:
        if max(ranks) <= rank:
            return rank
    raise UsageError(f"lora_r: vLLM loads adapters up to rank {_RANKS[-1]}, not {max(ranks)}: use engine: hf")


def check_vocabulary(policy: Policy, client: Client, model: str) -> None:
    """Raise FaultError when a server's vocabulary is another; Broken and Refused as the server does."""
    embeddings = policy.model.get_input_embeddings().num_embeddings
    # A server takes the ids that its model or its tokenizer knows.
    beyond = max(embeddings - 1, *policy.renderer.tokenizer.get_vocab().values()) + 1
    if not _knows(client, model, embeddings - 1) or _knows(client, model, beyond):
        raise FaultError(
            f"the vLLM server has another vocabulary than the policy, whose model has {embeddings:,} tokens: it serves "
            f"another model"
        )


def probe(policy: Policy, client: Client, model: str, *, context: int) -> float:
    """Ask a server for its greedy tokens after a prompt; return how far their log-probabilities differ, on average.

    Raises FaultError when that is too far, or a token is not the policy's best or close to it; Broken and Refused as
    the server does.
    """
    ids = tuple(policy.renderer.prompts([_PROBE])[0][: max(context - _PROBE_TOKENS, 1)])
    tokens = min(_PROBE_TOKENS, context - len(ids))
    action = ask(client, model, [Request(("probe",), ids, Sampling(temperature=0.0), (), tokens)], context=context)[0]
    own, best = _own_logprobs(policy, ids, action.ids)
    difference = (torch.tensor(action.logprobs, dtype=torch.float64) - own).abs()
    allowed = MOST_DIFFERENCE if _in_fp32(policy) else _OTHER_MODEL
    if float(difference.mean()) > allowed or float((best - own).max()) > 2 * allowed:
        text = policy.renderer.tokenizer.decode(list(action.ids))
        raise FaultError(
            f"the vLLM server does not play the policy: to {_PROBE!r} it says {text!r}, with log-probabilities that "
            f"differ by {float(difference.mean()):.2g} from the policy's, of which the best are up to "
            f"{float((best - own).max()):.2g} higher: it serves other weights, or another precision or template"
        )
    return float(difference.mean())


def _knows(client: Client, model: str, token: int) -> bool:
    """Return whether a server has an embedding for a token id."""
    try:
        completed(client, {"model": model, "prompt": [token], "max_tokens": 1, "temperature": 0.0})
    except Refused as refused:
        if "vocabulary" not in str(refused):
            raise
        return False
    return True


class Compared:
    """A few actions of a rollout, drawn evenly, with the log-probabilities that the server gave for them."""

    def __init__(self) -> None:
        self.number = 0
        self.drawn: list[tuple[Request, Action]] = []
        self.random = random.Random(0)

    def offer(self, request: Request, action: Action) -> None:
        """Take an action, or do not: all of a rollout have the same chance."""
        self.number += 1
        if len(self.drawn) < _COMPARED_ACTIONS:
            self.drawn.append((request, action))
        elif (place := self.random.randrange(self.number)) < _COMPARED_ACTIONS:
            self.drawn[place] = (request, action)

    def mismatch(self, policy: Policy) -> float | None:
        """Return by how much the server's log-probabilities differ from the policy's, on average; None without any.

        Raises MismatchError when that is too much in fp32 on a CPU, where nothing but the order of sums differs.
        """
        parts: list[torch.Tensor] = []
        for request, action in self._within_budget():
            own, _ = _own_logprobs(policy, request.context_ids, action.ids)
            parts.append((torch.tensor(action.logprobs, dtype=torch.float64) - own).abs())
        if not parts:
            return None
        mean = float(torch.cat(parts).mean())
        if _in_fp32(policy) and not mean <= MOST_DIFFERENCE:
            raise MismatchError(
                f"the vLLM server's log-probabilities differ by {mean:.2g} from the policy's, on average over "
                f"{sum(map(len, parts)):,} tokens, and in fp32 may by {MOST_DIFFERENCE:g}: what it samples is not "
                f"what is trained"
            )
        return mean

    def _within_budget(self) -> Iterable[tuple[Request, Action]]:
        tokens = 0
        for request, action in self.drawn:
            tokens += len(request.context_ids) + len(action.ids)
            if tokens > _COMPARED_TOKENS and tokens > len(request.context_ids) + len(action.ids):
                return
            yield request, action


@torch.no_grad()
def _own_logprobs(policy: Policy, context: Sequence[int], ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the policy's log-probabilities of ids (N,) after a context, and those of its best tokens there (N,)."""
    read = torch.tensor([[*context, *ids]], device=policy.model.device)
    with sampling_mode(policy.model, autocast=policy.precision.autocast):
        logits = policy.model(input_ids=read, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1).double().cpu()
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0], logprobs.amax(-1)


def _in_fp32(policy: Policy) -> bool:
    """Return whether the policy computes in fp32 on a CPU; a GPU may round products to TF32."""
    precision = policy.precision
    return precision.device == "cpu" and precision.autocast == "no" and precision.weights == torch.float32
