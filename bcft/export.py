"""A model, an adapter or a round as one ordinary model directory: `python -m bcft.export DIR --output_dir OUT`.

DIR is the directory of a run, of a round, of a model or of an adapter; or the `bc_model.pt` of the Archer framework.
With `--to dataset` or `--to pairs` the trajectories of a run are written for other tools instead.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from bcft.cli import guarded
from bcft.config.keys import KEYS
from bcft.config.loader import ASSIGNMENT
from bcft.config.schema import ModelSettings
from bcft.errors import StorageError, UsageError
from bcft.policy.gguf import is_gguf
from bcft.reporting.tables import say
from bcft.runs.directory import quiet_libraries
from bcft.runs.distributed import rank
from bcft.runs.progress import Progress
from bcft.runs.storage import finished, jsonl_rows, read_yaml
from bcft.selection.outcomes import export_dataset
from bcft.types import Problem

USAGE = "bcft export DIR --output_dir OUT [--key value | --key=value | key=value ...]"
ABOUT = """Write a model as one ordinary directory that transformers loads: all weights, an adapter merged into them,
a 4-bit base dequantized first. What it computes before and after is compared, in float32.

DIR is a run (of filtered its best/), a round such as runs/x/round_003, a model, an adapter, a GGUF file, or the
bc_model.pt of the Archer framework."""
EXAMPLE = """example: bcft export runs/filtered_bc --output_dir exported
         bcft export runs/filtered_bc --output_dir rows --to dataset"""
COMPARED = 8
"""Problems of a run whose prompts are compared."""
_OF_RUN = (
    "model_revision", "trust_remote_code", "chat_template_kwargs", "use_cpu", "load_in_4bit", "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)  # fmt: skip
"""Keys of a run's recipe that say how its model is loaded; tokenizer and template were saved with it."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    source: str
    output_dir: str
    to: str = "model"
    dtype: str = "auto"
    load_in_4bit: bool | None = None
    bnb_4bit_quant_type: str | None = None
    use_bnb_nested_quant: bool | None = None
    model_name_or_path: str | None = None
    lora_alpha: float = 0.0
    use_cpu: bool | None = None
    allow_remote_code: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for options that have no effect together."""
        only = {"dtype": "auto", "load_in_4bit": None, "bnb_4bit_quant_type": None, "use_bnb_nested_quant": None}
        archer = {"model_name_or_path": None, "lora_alpha": 0.0}
        if self.to != "model":
            self._refuse({**only, **archer, "use_cpu": None}, f"with to: {self.to}, which loads no model")
        elif self.of_archer:
            self._refuse({**only, "dtype": self.dtype}, "for a .pt file")
            if not self.model_name_or_path:
                raise UsageError(
                    f"model_name_or_path: required: {self.source} has weights only; name the model that it was trained "
                    f"from, or the directory of its configuration and tokenizer"
                )
        else:
            self._refuse(archer, "but for a .pt file: the directory has both")

    @property
    def of_archer(self) -> bool:
        """Whether the weights are in a file that `torch.save` wrote."""
        return self.source.endswith(".pt")

    def _refuse(self, unset: dict[str, Any], why: str) -> None:
        for name, value in unset.items():
            if getattr(self, name) != value:
                raise UsageError(f"{name}: has no effect {why}")


def run(source: str | Path, output_dir: str | Path, **options: Any) -> Path:
    """Export a directory to a new one; return it.

    options: those of the command line. Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    if unknown := sorted(options.keys() - {field.name for field in fields(Options)}):
        raise UsageError(f"{unknown[0]}: not an option of bcft export")
    return run_options(Options(str(source), str(output_dir), **options))


def run_options(options: Options) -> Path:
    """Export as the options say; return the new directory.

    Raises UsageError for what cannot be exported, StorageError where the output is not empty, CheckpointError when the
    written model computes something else: nothing is written then.
    """
    output = Path(options.output_dir)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise StorageError(f"output_dir: {str(output)!r} is there and not empty: give another output_dir, or remove it")
    if rank() > 0:  # there is nothing to share among processes
        return output
    if options.to != "model":
        say(export_dataset(Path(options.source), output, pairs=options.to == "pairs"), quiet=options.quiet)
        return output
    return _export_model(options, output)


def _export_model(options: Options, output: Path) -> Path:
    quiet, source = options.quiet, options.source
    given = {name: getattr(options, name) for name in ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")}
    given = {name: value for name, value in {**given, "use_cpu": options.use_cpu}.items() if value is not None}
    problems: list[Problem] = []
    if options.of_archer:
        if not Path(source).is_file():
            raise UsageError(f"{source}: there is no such file")
        settings = ModelSettings(str(options.model_name_or_path), **given)
    else:
        source = model_of(source)
        top = run_of(Path(source))
        settings = replace(_settings(top, allow_remote_code=options.allow_remote_code), **given)
        if not settings.load_in_4bit and (unused := given.keys() - {"load_in_4bit", "use_cpu"}):
            raise UsageError(f"{sorted(unused)[0]}: has no effect without load_in_4bit: true")
        problems = list(itertools.islice(_problems(top), COMPARED)) if top else []
    with Progress("" if quiet else "loading torch"):
        from bcft.algorithms.export import export_archer, export_model
        from bcft.policy.loading import cpu_threads

    with cpu_threads(), quiet_libraries(debug=False), Progress("" if quiet else "exporting"):
        done = (
            export_archer(Path(source), output, settings, dtype=options.dtype, lora_alpha=options.lora_alpha)
            if options.of_archer
            else export_model(source, output, settings, dtype=options.dtype, problems=problems)
        )
    of = "of the run" if problems else "of its own"
    rounded = f"; rounding to {done.dtype} changes one by {done.rounding:.2g}" if done.rounding else ""
    say(
        f"logits on {done.prompts} prompts {of}, in float32: the largest difference between {source} and {output} is "
        f"{done.difference:.2g} (at most {done.bound:.2g}; the largest logit is {done.largest:.3g}){rounded}",
        quiet=quiet,
    )
    outtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[done.dtype]
    say(
        f"a GGUF file of it, with llama.cpp: python convert_hf_to_gguf.py {output} --outfile {output.name}.gguf "
        f"--outtype {outtype}",
        quiet=quiet,
    )
    say(f"The model is in {output}: {done.parameters / 1e6:,.1f} M parameters in {done.dtype}", quiet=False)
    return output


def model_of(name: str) -> str:
    """Return the directory of the model that a path means; of a run its best, of a round its model.

    Raises UsageError where there is none or its run is not finished, CheckpointError for files that have changed.
    """
    path = Path(name)
    if is_gguf(name) or name.startswith("bcft:") or (not path.exists() and name.count("/") == 1):
        return name  # a file, the embedded model, or a model of the Hub
    if not path.is_dir():
        raise UsageError(f"{name}: there is no such directory")
    places = (path, path / "best", path / "model")
    model = next((place for place in places if _has_model(place)), None)
    if model is None:
        rounds = sorted(str(saved.parent) for saved in path.glob("round_*/model") if _has_model(saved))
        if rounds:
            raise UsageError(f"{name}: has no model: its run is not finished; give a round, such as {rounds[-1]}")
        raise UsageError(f"{name}: has no model: give the directory of a run, a round, a model or an adapter")
    top = run_of(model)
    result = top is not None and model in (top, top / "best")
    of_round = top is not None and model.name == "model"
    holder = top if result else model  # whose manifest commits the weights
    if holder is not None and not finished(holder) and (result or of_round):
        raise UsageError(
            f"{name}: its {'run' if result else 'round'} is not finished: re-run its command, or give a round"
        )
    return str(model)


def _has_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def run_of(path: Path) -> Path | None:
    """Return the run directory that a directory belongs to, or is; None where there is none."""
    places = (path, path.parent, path.parent.parent) if path.is_dir() else ()
    return next((p for p in places if (p / "config.yaml").is_file() and (p / "versions.json").is_file()), None)


def _settings(top: Path | None, *, allow_remote_code: bool) -> ModelSettings:
    """Return how a run loads its model; the defaults outside a run. Raises UsageError for code that is not allowed."""
    made = read_yaml(top / "config.yaml") if top else {}
    settings = ModelSettings(**{name: made[name] for name in _OF_RUN if name in made})
    if settings.trust_remote_code and not allow_remote_code:
        raise UsageError(f"{top}: its model runs code of the model's author: it needs --allow-remote-code")
    return settings


def _problems(top: Path) -> Iterator[Problem]:
    """Yield the problems of a run, the first ones first."""
    file = top / "problems.jsonl"
    for line, _ in jsonl_rows(file) if file.is_file() else ():
        columns = {key: value for key, value in line.items() if key not in ("problem_id", "prompt")}
        yield Problem(line["problem_id"], line["prompt"], columns)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"command line: {message}")


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"wants true or false, not {json.dumps(text)}")
    return text == "true"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = _Parser(
        "bcft export", usage=USAGE, description=ABOUT, epilog=EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("source", metavar="DIR", help="what to export")
    add = made.add_argument
    add(
        "--output_dir",
        required=True,
        metavar="OUT",
        help="the directory to write, new or empty; required",
    )
    add(
        "--to", choices=("model", "dataset", "pairs"), default="model",
        help="model, or the trajectories of a run with their outcomes: dataset, a row for each; pairs, chosen and "
        "rejected answers to a problem; default model",
    )  # fmt: skip
    add(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="the numbers to write; auto, the default: as they are stored, float32 for what is merged",
    )  # fmt: skip
    switch: dict[str, Any] = {"nargs": "?", "const": True, "type": _switch, "metavar": "true|false"}
    why = "; of a run its recipe says so"
    add("--load_in_4bit", **switch, help=f"the adapter's base was in 4 bits{why}")
    kinds = KEYS["bnb_4bit_quant_type"].choices or ("fp4", "nf4")
    add("--bnb_4bit_quant_type", choices=kinds, help=f"the kind of these bits{why}")
    add("--use_bnb_nested_quant", **switch, help=f"their scales were quantized too{why}")
    add("--use_cpu", **switch, help="compute on the CPU, whatever there is beside it")
    add("--model_name_or_path", metavar="BASE", help="for a .pt file: the model that it was trained from")
    add(
        "--lora_alpha",
        type=float,
        default=0.0,
        metavar="ALPHA",
        help="for a .pt file with a LoRA adapter: its run's",
    )
    add("--allow-remote-code", action="store_true", help="allow a model that runs its author's code, as its run did")
    add("--quiet", action="store_true", help="print the conclusion only")
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def options_of(argv: Sequence[str]) -> Options:
    """Read a command line. Raises UsageError for what is not understood."""
    words = [f"--{word}" if ASSIGNMENT.match(word) else word for word in argv]
    given = vars(parser().parse_args(words))
    del given["debug"]
    return Options(**given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*arguments}:
        parser().print_help()
        return 0
    return guarded(lambda: run_options(options_of(arguments)), debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
