"""A run for other tools: `python -m bcft.export DIR --output_dir OUT` writes one ordinary model directory.

DIR is the output_dir of `sft` or `filtered`, a round of it, or the directory of a model or of an adapter. Adapters are
merged, 4-bit bases are dequantized before. `--to dataset` and `--to pairs` write the trajectories of a run. DIR may
also be a file that `torch.save({"model_state_dict": ...})` wrote, such as Archer's `bc_model.pt`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bcft.cli import guarded
from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.reporting.tables import say
from bcft.runs.storage import read_jsonl, read_yaml

if TYPE_CHECKING:
    from bcft.algorithms.export import Exported

DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = ("What is 6 x 7?", "Name three colors.", "Why is the sky blue?", "Write one sentence about winter.")
"""What a model is compared on that no run made."""
_MOST = 8
"""Problems of a run that its model is compared on."""
_OF_MODEL = ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "model_revision")
"""Keys of a run that say how the base of its adapter was loaded."""
_PICKLES = (".pt", ".pth", ".bin")
USAGE = """usage: bcft export DIR --output_dir OUT [--to model | dataset | pairs]
       (or python -m bcft.export)

Write a run for other tools: one ordinary model directory, or its trajectories. Adapters are merged; a 4-bit base is
dequantized before. Logits before and after are compared on prompts of the run.

examples: bcft export runs/filtered_bc --output_dir runs/model
          bcft export runs/filtered_bc --to dataset --output_dir runs/trajectories
          bcft export bc_model.pt --model_name_or_path meta-llama/Llama-3.2-3B-Instruct --output_dir runs/imported

DIR                     a run of sft or filtered, a round, a model, an adapter, or a file of torch.save
  --output_dir          required; a directory that does not exist yet
  --to                  model (default); dataset: trajectories as messages with their outcomes; pairs: the same as
                        chosen and rejected, for preference tuning
  --dtype               float32 (default), bfloat16 or float16: numbers of the weights that are written
  --model_name_or_path  the model that the weights in a file of torch.save belong to
  --debug               show the traceback of an error"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise UsageError: one line."""
        raise UsageError(f"command line: {message}; bcft export --help shows what it takes")


def run(
    directory: str | Path,
    *,
    output_dir: str | Path,
    to: str = "model",
    dtype: str = "float32",
    model_name_or_path: str = "",
) -> Path:
    """Export a run, a round, a model or a file; return where it was written.

    to: `model`, `dataset` or `pairs`; dtype: of a model's weights; model_name_or_path: of a file of `torch.save`.
    Raises a `bcft.errors.BcftError`.
    """
    source, output = Path(directory), Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"output_dir: {output} exists: give another, or remove it")
    if to in ("dataset", "pairs"):
        from bcft.selection.outcomes import export_dataset

        say(export_dataset(source, output, pairs=to == "pairs"), quiet=False)
        return output
    imported = source.suffix in _PICKLES and not source.is_dir()
    if imported != bool(model_name_or_path):
        raise UsageError(
            f"model_name_or_path: required with {source}, whose weights belong to that model"
            if imported
            else f"model_name_or_path: has no effect with {source}, which names its model: leave it out"
        )
    name = Path(model_name_or_path) if imported else _weights(source)
    made = {} if imported else _recipe(name)
    known = {field.name for field in fields(ModelSettings)}
    settings = ModelSettings(str(name) if not imported else model_name_or_path, **{
        key: made[key] for key in _OF_MODEL if key in made and key in known
    })  # fmt: skip
    from bcft.algorithms.export import export_model

    exported = export_model(
        settings.model_name_or_path,
        settings,
        output,
        prompts=_prompts(name) or PROMPTS,
        dtype=dtype,
        weights=source if imported else None,
    )
    _report(exported, str(source), output, dtype)
    return output


def _weights(source: Path) -> Path:
    """Return the directory of weights that a run, a round or a model directory means; raise UsageError for others."""
    for place in (source / "best", source / "model", source):
        if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
            return place
    if not source.is_dir():
        raise UsageError(f"{source}: there is no such directory: give the output_dir of sft or filtered, or a model")
    if (source / "status.json").is_file():
        raise UsageError(f"{source} is not finished: run its command again, or give one of its rounds")
    if (source / "manifest.json").is_file():
        raise UsageError(f"{source}: its weights were removed to save space (save_total_limit): give the run itself")
    raise UsageError(f"{source} holds no model: give the output_dir of sft or filtered, a round, or a model")


def _recipe(weights: Path) -> dict[str, Any]:
    """Return the recipe of the run that made a directory of weights; empty if none did."""
    places = (weights, weights.parent, weights.parent.parent)
    return next((read_yaml(p / "config.yaml") for p in places if (p / "versions.json").is_file()), {})


def _prompts(weights: Path) -> list[Any]:
    """Return prompts of the run that made a directory of weights; empty if there are none."""
    for place in (weights, weights.parent, weights.parent.parent):
        if (place / "problems.jsonl").is_file():
            return [row["prompt"] for row in read_jsonl(place / "problems.jsonl")[:_MOST]]
    return []


def _report(exported: "Exported", source: str, output: Path, dtype: str) -> None:
    """Print what was written, how equal it is, and what to do with it."""
    size = exported.size / 1e6
    say(f"{output}: {source}, {exported.what}, {dtype}, {size:,.1f} MB", quiet=False)
    say(
        f"logits: at most {exported.apart:.1e} from those of {source} in fp32, of {exported.largest:.1f} at most"
        + ("" if dtype == "float32" else f"; {exported.rounded:.1e} after rounding to {dtype}"),
        quiet=False,
    )
    say(
        f'load it:  transformers.AutoModelForCausalLM.from_pretrained("{output}")\n'
        f"GGUF:     python llama.cpp/convert_hf_to_gguf.py {output} --outfile {output}.gguf   (script of llama.cpp)",
        quiet=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return 0

    def export() -> None:
        parser = _Parser(prog="bcft export", add_help=False, allow_abbrev=False)
        parser.add_argument("directory", metavar="DIR")
        parser.add_argument("--output_dir", required=True)
        parser.add_argument("--to", choices=("model", "dataset", "pairs"), default="model")
        parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
        parser.add_argument("--model_name_or_path", default="")
        parser.add_argument("--debug", action="store_true")
        options = vars(parser.parse_args(arguments))
        del options["debug"]
        run(options.pop("directory"), **options)

    return guarded(export, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
