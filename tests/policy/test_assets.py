"""The embedded policy and its tokenizer: a character a token, one BOS, an untrained model that is always the same."""

from pathlib import Path

import pytest

from bcft.config.schema import ModelSettings
from bcft.policy.loading import ASSETS, load_policy, load_renderer

TINY = ASSETS / "tiny-math"


@pytest.fixture(scope="module")
def renderer():
    return load_renderer("bcft:tiny-math", ModelSettings())


def test_every_printable_character_is_one_token_and_comes_back(renderer):
    text = "".join(map(chr, range(0x20, 0x7F))) + "\n  a \n\n , . n't  's"
    ids = renderer.tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert renderer.tokenizer.decode(ids) == text


def test_other_characters_are_unknown_tokens(renderer):
    assert renderer.tokenizer("é€")["input_ids"] == [renderer.tokenizer.unk_token_id] * 2


def test_pad_bos_and_stop_are_three_tokens(renderer):
    tokenizer = renderer.tokenizer
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert renderer.stop_ids == (tokenizer.eos_token_id,)
    assert renderer.bos_count == 1


def test_the_template_speaks_for_system_user_and_assistant(renderer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert renderer.text(messages) == "<bos><|system|>s<|end|><|user|>u<|end|><|assistant|>"


def test_the_assets_fit_into_four_megabytes_and_contain_no_pickle():
    assert sum(file.stat().st_size for file in Path(TINY).iterdir()) < 4 * 2**20
    assert not [file for file in Path(TINY).iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_the_untrained_model_is_the_same_every_time():
    first, again = (load_policy("bcft:tiny-init", ModelSettings()) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
