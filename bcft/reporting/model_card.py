"""The README of a saved model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

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
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
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
from {library} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("{directory}")
tokenizer = AutoTokenizer.from_pretrained("{directory}")
```

Recipe:

```yaml
{yaml.safe_dump(dict(recipe), allow_unicode=True).strip()}
```
"""
