"""Stop tokens that a base model was never trained on: an adapter that leaves the head alone cannot learn to stop.

Llama 3's base models reserve control tokens, `<|eot_id|>` among them, whose rows are 0 or nearly so
(https://github.com/meta-llama/llama3/issues/77). Rows that are equal have equal logits, so no hidden state makes one of
these tokens likelier than the others.
"""

from typing import Any

import torch

from bcft.config.schema import ModelSettings

_EQUAL = 1e-6
"""Rows are equal whose numbers differ by no more: those of trained rows are some 0.01 to 0.1."""
_FIRST = 8
"""Numbers of a row that tell nearly all rows apart."""


def untrained_stop(model: Any, token: int, text: str, settings: ModelSettings) -> str:
    """Return one line with the remedy if an adapter would have to stop with a token that was never trained; else ''.

    token: the id that ends an action; text: how it is written; settings: of an adapter, which trains the head too if
    `lora_modules_to_save` has it.
    """
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return ""
    tied = head.weight is embeddings.weight
    wanted = {names[head], names[embeddings]} if tied else {names[head]}
    if wanted & {name.rpartition(".")[2] for name in settings.lora_modules_to_save or ()}:
        return ""
    why = _untrained(head.weight, token)
    if not why:
        return ""
    modules = names[head] if tied else f"{names[embeddings]}, {names[head]}"
    return (
        f"warning: the stop token {text!r} (id {token}) was never trained in this model: its row of the head {why}, so "
        f"an adapter cannot learn to stop with it: use the model's Instruct version, or train these rows too, with "
        f"lora_modules_to_save: [{modules}]"
    )


@torch.no_grad()
def _untrained(weight: torch.Tensor, token: int) -> str:
    """Return what shows that a token's row of (V, H) weights was never trained; '' if nothing does."""
    if not weight.is_floating_point() or not token < len(weight):
        return ""
    row = weight[token].float()
    if float(row.abs().max()) <= _EQUAL:
        return "is all zeros"
    like = (weight[:, :_FIRST].float() - row[:_FIRST]).abs().amax(1) <= _EQUAL
    others = weight[like].float()
    same = int(((others - row).abs().amax(1) <= _EQUAL).sum()) - 1
    return f"is equal to {same:,} others" if 0 < same < len(weight) - 1 else ""
