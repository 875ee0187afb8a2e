"""The README of a saved model, made from the files of its run: the same files give the same text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from bcft.policy.gguf import PACKAGE, is_gguf, split
from bcft.reporting.cards import (
    as_yaml,
    configuration,
    functions_of,
    hub_ids,
    made_with,
    model_of,
    public,
    quoted,
    recipe_of,
    rule_of,
    source_names,
)
from bcft.reporting.hub import is_embedded
from bcft.reporting.run_files import RunFiles
from bcft.reporting.tables import (
    cell,
    conclusion,
    markdown_table,
    mean,
    percent,
    scaled_name,
    success_or_reward,
    table_rows,
)
from bcft.runs.history import AVERAGES
from bcft.runs.storage import read_json
from bcft.selection.filter import REASONS

METHODS = {"sft": "behavior cloning", "filtered": "filtered behavior cloning"}


def model_card(run: Path, *, name: str = "", against: Path | None = None) -> str:
    """Return the README of a finished run's model: base, data, recipe, rounds, filter, figures, limits, how to load it.

    name: what `from_pretrained` loads it by, such as a Hub id; '': the directory that it is in; against: another run to
    set beside it, such as its random control.
    """
    model = model_of(run)
    name = name or str(model)
    config, metrics = configuration(run), read_json(run / "metrics.json")
    command = "filtered" if "best" in metrics else "sft"
    base, trained = str(config["model_name_or_path"]), metrics["best" if command == "filtered" else "final"]
    columns = {"base": metrics["base"], "best" if command == "filtered" else "final": trained}
    control, comparison = _control(run, against) if against else ({}, "")
    columns = {column: figures for column, figures in (columns | control).items() if figures}
    table = markdown_table(["", *columns], table_rows(columns)) if columns else ""
    sources = source_names(config)
    data = ", ".join(map(quoted, sources)) + f" (split {quoted(config['dataset_train_split'])})"
    parts = [
        f"# {Path(name).name}",
        f"{quoted(base)} after {METHODS[command]} with bcft on {data}, loss on the completion only.",
        metrics["conclusion"],
        table,
        comparison,
        f"```python\n{_loading(name, _base_of(model), adapter=_is_adapter(model))}\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
        "## Training",
        *(_rounds(run, config, metrics) if command == "filtered" else _rows(metrics["train"])),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(run, config, metrics, trained)),
        "## Recipe",
        as_yaml(recipe_of(config)),
        f"The keys that are not here are as by default. {made_with(run)}",
    ]
    about = _metadata(command, config, trained, title=Path(name).name, base=_base_of(model))
    return f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _metadata(
    command: str, config: Mapping[str, Any], trained: Mapping[str, Any], *, title: str, base: str
) -> ModelCardData:
    """Return the head of the card, without names that nobody finds on the Hub; base: of an adapter, else ''."""
    sources = source_names(config)
    results = list(_results(trained, sources))
    return ModelCardData(
        library_name="peft" if base else "transformers",
        pipeline_tag="text-generation",
        base_model=hub_ids(base or str(config["model_name_or_path"])),
        datasets=hub_ids(*sources),
        tags=["bcft", "behavior-cloning", command],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _results(trained: Mapping[str, Any], sources: Sequence[str]) -> Iterator[EvalResult]:
    """Yield the figures of a test as the Hub has them; the interval is in the name, since it has no place for one."""
    dataset = " + ".join(str(public(source)) for source in sources)
    figures = [("greedy", "success", "accuracy", "solved, greedy")]
    if "sampled" in trained:
        samples, k = trained["sampled"]["n"], trained["sampled"]["k"]
        figures.append(("sampled", "pass@1", "pass@1", f"solved, sampled x {samples}"))
        figures.append(("sampled", "pass@k", f"pass@{k}", f"pass@{k}"))
    figures += [(average, "mean", f"mean_{average}", f"mean {average}") for average in AVERAGES]
    for part, figure, kind, words in figures:
        if part in trained:
            low, high = trained[part]["ci95"]
            interval = "" if figure == "pass@k" else f", 95 % interval {low:.4g} to {high:.4g}"
            yield EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=kind,
                metric_value=round(trained[part][figure], 6),
                metric_name=f"{words}, {trained['n']} held-out problems{interval}",
            )


def _control(run: Path, against: Path) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Return the column of another run, and how the two compare; nothing while either is unfinished."""
    mine, other = RunFiles.read(run), RunFiles.read(against)
    if not (mine.metrics and other.metrics):
        return {}, ""
    name = "random control" if other.config["control"] == "random" else str(public(against.name))
    ours, theirs = mine.tested(), other.tested()
    if not (ours and theirs) or ours.evaluation.problems.keys() != theirs.evaluation.problems.keys():
        return {name: other.metrics["best"]}, ""
    sentence = conclusion(theirs, ours, before=f"in the {name}")["conclusion"]
    return {name: other.metrics["best"]}, f"Beside the {name}, paired problem by problem: {sentence}."


def _rows(train: Mapping[str, Any]) -> list[str]:
    """Return what `sft` trained on."""
    return [
        f"{train['rows']:,} demonstrations, {train['tokens_supervised']:,} of their tokens with loss; "
        f"{train['steps']:,} optimizer steps, loss {train['loss_first']:.4f} to {train['loss_last']:.4f} nats a token."
    ]


def _rounds(run: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Return where the rows of a filtered run come from: the rounds, the filter, and what it rejected."""
    files = RunFiles.read(run)
    rejected = {reason: sum(r["selection"]["rejected"][reason] for r in files.rounds) for reason in REASONS}
    kept = sum(r["selection"]["kept"] for r in files.rounds)
    reasons = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in rejected.items() if n)
    functions = ", ".join(f"`{name}`" for name in functions_of(run)) or "the environment alone"
    best = metrics["best_round"]
    chosen = f"Problems held out as dev chose {scaled_name(best, metrics.get('scale', 1.0))}."
    if not best:
        chosen = "On problems held out as dev no round was better than the base, so this is the base."
    drawn = " This run is a random control: its rows were drawn without looking at rewards."
    return [
        f"The policy's own trajectories. In each of {metrics['rounds']} rounds it attempted problems of the training "
        f"split, and was trained on the attempts that were kept. {chosen}"
        f"{drawn if config['control'] == 'random' else ''}",
        markdown_table(
            ["round", "played", "success", "kept", "rows", "cutoff", "dev"], [_round(record) for record in files.rounds]
        ),
        f"Graded by {functions} (name and hash of the source). Kept {kept:,}; rejected: {reasons or 'none'}. The "
        "filter's rule:",
        as_yaml(rule_of(config)),
    ]  # fmt: skip


def _round(record: Mapping[str, Any]) -> list[str]:
    """Return a round's line of the table."""
    dev, selection = record.get("eval", {}), record["selection"]
    level = next((mean(dev, part) for part in AVERAGES if part in dev), cell(dev, "sampled", "pass@1"))
    numbers = (selection["kept"], record["train"]["rows"])
    played = f"{record['rollout']['played']:,}"
    counts = [f"{number:,}" for number in numbers]
    success, cutoff = success_or_reward(record["rollout"]), f"{selection['cutoff']:.3g}"
    return [str(record["round"]), played, success, *counts, cutoff, level]


def _limits(
    run: Path, config: Mapping[str, Any], metrics: Mapping[str, Any], trained: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what the figures do not say."""
    if trained:
        yield (
            f"The figures are of {trained['n']:,} held-out problems of the same dataset, and of one run with seed "
            f"{config['seed']}. They say nothing about other tasks. Brackets are 95 % intervals."
        )
    else:
        yield "Nothing was measured on held-out problems."
    if "best" in metrics:
        yield "A trajectory counts as solved where its reward function or environment says so."
        records = [record["selection"] for record in RunFiles.read(run).rounds]
        if any("kept_with_wrong_step" in selection for selection in records):
            wrong = sum(selection.get("kept_with_wrong_step", 0) for selection in records)
            share = percent(wrong / max(sum(selection["kept"] for selection in records), 1))
            yield f"{wrong:,} kept solutions ({share}) reach the right answer by a wrong step."
    yield "Licenses and terms of use of the base and of the data apply."


def _is_adapter(model: Path) -> bool:
    return (model / "adapter_config.json").is_file()


def _base_of(directory: Path) -> str:
    """Return the name that a saved adapter has for its base; '' where none is saved."""
    file = directory / "adapter_config.json"
    base = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]) if file.is_file() else ""
    return "bcft:tiny-math" if is_embedded(base) else base


def _loading(name: str, base: str, *, adapter: bool) -> str:
    """Return the lines that load the model; peft cannot load a base that is a GGUF file by itself."""
    if base.startswith("bcft:"):  # a name that only bcft knows
        return f"""import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcft.policy.sources import locate

base = AutoModelForCausalLM.from_pretrained(locate("{base}"), dtype=torch.float32)
model = PeftModel.from_pretrained(base, "{name}")"""
    if not is_gguf(base):
        loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
        apart = f"from peft import {loader}\nfrom transformers import"
        return f"""{apart if adapter else f"from transformers import {loader},"} AutoTokenizer

model = {loader}.from_pretrained("{name}")"""
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
model = PeftModel.from_pretrained(base, "{name}")"""
