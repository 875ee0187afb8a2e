"""What can be refused before weights are loaded, in one order for every command; and the disk that a run needs."""

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from bcft.config.schema import ModelSettings, TrainingSettings
from bcft.errors import StorageError, UsageError
from bcft.policy.adapters import adapt_without_storage, check_adapter, trained_parameters
from bcft.policy.chat_template import Renderer
from bcft.policy.precision import check_dtype, check_saved_modules, choose_precision
from bcft.policy.shape import build_without_storage, check_engine
from bcft.policy.sources import adapter_base, base_config, check_base, locate, refuse_pickles
from bcft.policy.tokenizer import GenerationFile, load_generation_file, load_tokenizer


@dataclass(frozen=True)
class Checked:
    """What was loaded to check a model, none of it weights."""

    renderer: Renderer
    generation: GenerationFile


def check_model(name: str, settings: ModelSettings, *, trainable: bool = True) -> Checked:
    """Refuse what can be refused without weights; return what was loaded for it.

    In this order: precision; the tokenizer, generation config and template; the configuration, and whether the engine
    can sample the model; ids against embeddings; pickles; 4-bit weights; the adapter. trainable: False for a policy
    that is only sampled. Raises UsageError, and DataError for templates and pickles.
    """
    source = locate(name, settings)
    if trainable:
        check_dtype(source, settings)
    check_base(source)
    base = adapter_base(source)
    tokenizer, generation = load_tokenizer(name, settings), load_generation_file(name, settings)
    renderer = Renderer(tokenizer, generation.stop_ids, settings.chat_template_kwargs)
    config = base_config(name, settings)
    check_engine(base or source, config)
    model = build_without_storage(base or source, config, settings, attention=True)
    check_ids(name, renderer, embeddings=model.get_input_embeddings().num_embeddings)
    refuse_pickles(base or source)
    if settings.load_in_4bit:
        _check_bitsandbytes()
        if trainable:
            check_four_bits(source, settings)
    if base:
        check_adapter(source, model)
    elif trainable and settings.use_peft:
        adapt_without_storage(model, settings)
        if settings.lora_modules_to_save:
            check_saved_modules(choose_precision(name, settings))
    return Checked(renderer, generation)


def check_ids(name: str, renderer: Renderer, *, embeddings: int) -> None:
    """Raise UsageError when the renderer can produce an id for which the model has no embedding.

    A special token that neither the template nor the tokenizer's own roles use is never produced: Gemma 3's text
    models have one such id beyond their embeddings.
    """
    tokenizer = renderer.tokenizer
    beyond = dict(sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= embeddings))
    if not beyond:
        return
    special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {*renderer.stop_ids, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    template = str(tokenizer.chat_template or "")
    wrong = [i for i, token in beyond.items() if token not in special or i in used or token in template]
    if wrong:
        raise UsageError(
            f"model_name_or_path: the tokenizer of {name!r} has {len(tokenizer)} tokens and its model {embeddings} "
            f"embeddings, none for {beyond[wrong[0]]!r} (id {wrong[0]}): use the tokenizer that the model was trained "
            f"with, or save the model after model.resize_token_embeddings({max(beyond) + 1})"
        )


def check_four_bits(name: str, settings: ModelSettings) -> None:
    """Raise UsageError for 4-bit weights that a run would have to train without an adapter."""
    if settings.load_in_4bit and not (settings.use_peft or adapter_base(name)):
        raise UsageError("load_in_4bit: 4-bit weights cannot train by themselves: set use_peft: true")


def check_disk(
    directory: Path,
    name: str,
    settings: ModelSettings,
    training: TrainingSettings,
    *,
    copies: int,
    optimizer: bool | None = None,
) -> None:
    """Raise StorageError when the disk cannot hold what the run will write, less what is in its directory already.

    copies: of the trained weights, in fp32; optimizer: whether its state is written beside one of them; None: as
    `save_strategy` says.
    """
    model = build_without_storage(name, base_config(name, settings), settings)
    source = locate(name, settings)
    base = adapter_base(source)
    parameters = model.num_parameters()
    if base or settings.use_peft:
        parameters = trained_parameters(model, source if base else "", settings)
    saves = training.passed_through.get("save_strategy", "steps") != "no" if optimizer is None else optimizer
    moments = 0 if training.optim in ("sgd", "adafactor") else 2 if "8bit" in training.optim else 8
    needed = 4 * parameters * copies + (moments * parameters if saves else 0)
    written = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0
    free = _free(directory)
    if needed - written > free:
        raise StorageError(
            f"output_dir: {str(directory)!r} needs about {_gigabytes(needed - written)} ({copies} x "
            f"{_gigabytes(4 * parameters)} of weights{' and the optimizer' if saves and moments else ''}), and its "
            f"disk has {_gigabytes(free)} free: make room or give another output_dir"
        )


def check_room(directory: Path, needed: int) -> None:
    """Raise StorageError when the disk of a directory, which need not be there yet, has fewer bytes free."""
    free = _free(directory)
    if needed > free:
        raise StorageError(
            f"output_dir: {str(directory)!r} needs about {_gigabytes(needed)} of weights, and its disk has "
            f"{_gigabytes(free)} free: make room or give another output_dir"
        )


def _free(directory: Path) -> int:
    place = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    return shutil.disk_usage(place).free


def _check_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("load_in_4bit: bitsandbytes is not installed: run `pip install bitsandbytes`")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
