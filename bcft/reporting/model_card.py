"""The README of a saved model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bcft.config.loader import Recipe
from bcft.reporting.tables import table_rows

METHODS = {"sft": "behaviour cloning", "filtered": "filtered behaviour cloning"}


def model_card(recipe: Recipe, metrics: Mapping[str, Any], data: str, *, directory: Path, adapter: bool) -> str:
    """Return the README of a saved model: data, recipe, numbers, and how to load it."""
    columns = {name: metrics[name] for name in ("base", "final", "best") if metrics.get(name)}
    head, *lines = [["", *columns], *table_rows(columns)] if columns else [[""]]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    source = "peft" if adapter else "transformers"
    keys = "\n".join(f"{key}: {recipe[key]}" for key in sorted(recipe.given))
    return f"""---
library_name: {source}
tags: [bcft, behaviour-cloning, {recipe.command}]
---
# {directory.name}

`{recipe["model_name_or_path"]}` after {METHODS[recipe.command]} with bcft on `{recipe["dataset_name"]}`
(split `{recipe["dataset_train_split"]}`), loss on the completion only.

{metrics["conclusion"]}

{table if columns else ""}

Training data: {data}.

```python
from {source} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("{directory}")
tokenizer = AutoTokenizer.from_pretrained("{directory}")
```

Recipe:

```yaml
{keys}
```
"""
