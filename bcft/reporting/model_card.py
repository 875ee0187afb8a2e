"""The README of a saved model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bcft.policy.gguf import PACKAGE, is_gguf, split
from bcft.reporting.tables import markdown_table, table_rows

METHODS = {"sft": "behavior cloning", "filtered": "filtered behavior cloning"}


def model_card(
    metrics: Mapping[str, Any],
    *,
    command: str,
    base: str,
    dataset: str,
    split: str,
    data: str,
    directory: Path,
    adapter: bool,
    recipe: Mapping[str, Any],
) -> str:
    """Return the README of a saved model: its data, its figures, how to load it, and the recipe that made it.

    metrics: `conclusion`, and the summaries among `base`, `final` and `best`; command: `sft` or `filtered`; base,
    dataset and split: names as in the recipe; data: what the training examples are; recipe: the keys that were given.
    """
    columns = {name: metrics[name] for name in ("base", "final", "best") if metrics.get(name)}
    table = markdown_table(["", *columns], table_rows(columns)) if columns else ""
    library = "peft" if adapter else "transformers"
    return f"""---
library_name: {library}
tags: [bcft, behavior-cloning, {command}]
---
# {directory.name}

`{base}` after {METHODS[command]} with bcft on `{dataset}` (split `{split}`), loss on the completion only.

{metrics["conclusion"]}

{table}

Training data: {data}.

```python
{_loading(directory, _base_of(directory) if adapter else "", adapter=adapter)}
tokenizer = AutoTokenizer.from_pretrained("{directory}")
```

Recipe:

```yaml
{yaml.safe_dump(dict(recipe), allow_unicode=True).strip()}
```
"""


def _base_of(directory: Path) -> str:
    """Return the name that a saved adapter has for its base; '' where none is saved."""
    file = directory / "adapter_config.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]) if file.is_file() else ""


def _loading(directory: Path, base: str, *, adapter: bool) -> str:
    """Return the lines that load the model; peft cannot load a base that is a GGUF file by itself."""
    if not is_gguf(base):
        library, loader = ("peft", "AutoPeftModel") if adapter else ("transformers", "AutoModel")
        return f"""from {library} import {loader}ForCausalLM
from transformers import AutoTokenizer

model = {loader}ForCausalLM.from_pretrained("{directory}")"""
    place, file = split(base)
    find, where = "", f'"{place}"'
    if base.startswith(PACKAGE):
        package, _, file = base.removeprefix(PACKAGE).partition("/")
        find = "from importlib.util import find_spec\n\n"
        where = f'find_spec("{package}").submodule_search_locations[0]'
    return f"""{find}import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({where}, gguf_file="{file}", dtype=torch.float32)
model = PeftModel.from_pretrained(base, "{directory}")"""
