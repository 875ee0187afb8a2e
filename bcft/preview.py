"""What will be trained: `python -m bcft.preview RECIPE [--json | --html]`.

Every token of the first rows with its label, exactly as the trainer gets it; no model is loaded.
"""

import html
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from bcft.cli import execute
from bcft.config.entries import Recipe
from bcft.config.loader import Config, load
from bcft.config.python import Rows, named_rows, rows_of
from bcft.data.loading import load_splits
from bcft.data.weights import scaled
from bcft.types import IGNORED


def run(
    recipe: Recipe | None = None,
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Return the first rows: `{where, problem_id, weight, tokens: [{id, text, label}]}`, label -100 without loss.

    weight: what the loss of the row's tokens is multiplied by.

    recipe: a path, or a dict of keys. train_dataset: rows in place of `dataset_name`, a `datasets.Dataset` or dicts;
    those that a run would hold out are left out.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    rows = rows_of(train_dataset)
    return first_rows(load("preview", recipe, overrides, objects=named_rows(rows)), rows=rows)[0]


def first_rows(config: Config, *, rows: Rows | None = None) -> tuple[list[dict[str, Any]], str]:
    """Return the first rows as configured, and the counts of all rows in words.

    rows: in place of the dataset that the recipe names.
    """
    given = load_splits(config.data, config.evaluation, train=rows).train

    from bcft.data.checks import check_prompts, without_special_tokens
    from bcft.data.examples import make_examples
    from bcft.policy.loading import load_renderer, longest_row
    from bcft.reporting.training_rows import row_tokens

    name = config.model.model_name_or_path
    renderer = load_renderer(name, config.model)
    spelled = config.data.special_tokens
    check_prompts((d.problem for d in given), renderer, special_tokens=spelled)
    demonstrations, *notes = without_special_tokens(given, renderer, special_tokens=spelled)
    examples, counts = make_examples(
        demonstrations,
        renderer,
        max_length=longest_row(name, config.model, config.data.max_length),
        overlength=config.data.overlength,
        train_on=config.data.train_on,
    )
    weighted, weights_note = scaled(examples, config.training)
    shown = [row_tokens(example, renderer) for example in weighted[: config.data.preview_rows]]
    return shown, "; ".join(filter(None, [str(counts), *notes, weights_note]))


def show(config: Config) -> None:
    """Print the rows in color, as JSON or as a page."""
    rows, counts = first_rows(config)
    if "json" in config.flags:
        print(json.dumps(rows, ensure_ascii=False))
        return
    if "html" in config.flags:
        print(page(rows, counts))
        return
    console = Console(soft_wrap=True, highlight=False)
    for row, shade in zip(rows, shades(rows), strict=True):
        supervised = sum(token["label"] != IGNORED for token in row["tokens"])
        about = f"{len(row['tokens'])} tokens, {supervised} with loss{weight_words(row)}"
        console.print(f"[bold]{row['where']}[/]: {about}", style="cyan")
        text = Text()
        for token in row["tokens"]:
            # Alternating shades keep neighboring tokens apart; without color, brackets do.
            masked = token["label"] == IGNORED
            style = "dim" if masked else _style(shade, bright=len(text) % 2 == 1)
            shown = visible(token["text"])
            text.append(shown if console.is_terminal or masked else f"[{shown}]", style=style)
        console.print(text)
    weighs = "" if all(shade == 1.0 for shade in shades(rows)) else ", the paler the less its row weighs"
    console.print(f"\n[black on green]green[/] (or in brackets): carries loss{weighs}; dim: prompt, no loss")
    console.print(f"all rows: {counts}")


def shades(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return how dark each row is shown, in (0, 1]: its weight, as a share of the largest one."""
    most = max((row["weight"] for row in rows), default=1.0)
    return [row["weight"] / most for row in rows]


def weight_words(row: Mapping[str, Any]) -> str:
    """Return the weight of a row in words, '' if it is 1."""
    return "" if row["weight"] == 1.0 else f", weight {row['weight']:.3g}"


def _style(shade: float, *, bright: bool) -> str:
    """Return the style of a token that carries loss: green, and with a smaller shade closer to white."""
    if shade == 1.0:
        return "black on bright_green" if bright else "black on green"
    pale = round(255 - (205 if bright else 255) * shade)
    return f"black on rgb({pale},255,{pale})"


def visible(text: str) -> str:
    """Return a token's text with visible line breaks and tabs."""
    return text.replace("\n", "⏎\n").replace("\t", "⇥") or "∅"


def page(rows: Sequence[Mapping[str, Any]], counts: str) -> str:
    """Return the rows as one self-contained HTML page."""
    body = []
    for row, shade in zip(rows, shades(rows), strict=True):
        spans = "".join(
            f'<span class="{"off" if token["label"] == IGNORED else "on"}" title="{token["id"]}">'
            f"{html.escape(visible(token['text']))}</span>"
            for token in row["tokens"]
        )
        shaded = "" if shade == 1.0 else f' style="--shade:{shade:.2f}"'
        body.append(f"<h2>{html.escape(row['where'])}{weight_words(row)}</h2><pre{shaded}>{spans}</pre>")
    weighs = "" if all(shade == 1.0 for shade in shades(rows)) else ", the paler the less their row weighs"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>bcft preview</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
h2{{font-size:1rem}}pre{{white-space:pre-wrap;font:15px/1.8 ui-monospace,monospace}}
.on{{background:rgb(183 240 193/var(--shade,1));color:#000;outline:1px solid #7ccf8c}}.off{{color:#888}}</style>
<h1>What carries loss</h1><p><span class="on">Green tokens</span> carry loss{weighs}, <span class="off">gray ones</span>
do not; hover over a token to see its id. {html.escape(counts)}.</p>
{"".join(body)}</html>"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("preview", show, argv)


if __name__ == "__main__":
    sys.exit(main())
