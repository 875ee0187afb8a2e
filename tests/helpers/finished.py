"""The files of a finished run of `filtered` with one round, made without a model."""

import shutil
from pathlib import Path

import yaml

import bcft
from bcft.config.loader import load
from bcft.runs.storage import commit_round, read_json, write_json, write_jsonl, write_manifest
from bcft.selection.filter import REASONS

EMBEDDED = Path(bcft.__file__).parent / "assets" / "tiny-math"
FIGURES = {
    "n": 4, "stop_rate": 1.0, "greedy": {"success": 0.5, "ci95": [0.15, 0.85]},
    "sampled": {"n": 2, "k": 1, "pass@1": 0.625, "ci95": [0.3, 0.95], "pass@k": 0.625, "maj@k": 0.5},
}  # fmt: skip
ATTEMPTS = {"1-aa-0": "yes", "1-aa-1": "no", "1-bb-0": "yes", "1-bb-1": "yes"}
KEPT = ("1-aa-0", "1-bb-1")


def finished_run(path, *, adapter=False, kept=KEPT, **keys):
    """Write the files; adapter: as if one was trained; kept: the trajectories. Returns the configuration."""
    given = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "output_dir": str(path)}
    config = load("filtered", None, given | keys)
    directory, best = path / "round_001", path / "best"
    best.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config.resolved))
    versions = {"packages": {"bcft": "0.1.0"}, "python": "3", "gpus": [], "cpu": "c", "data": "d" * 64}
    write_json(path / "versions.json", versions | {"functions": ["bcft.rewards.math_answers.math_reward@0a1b2c3d"]})
    scores = [
        {"id": i, "graded": True, "reward": float(s == "yes"), "rewards": [], "success": s, "cutoff": 1.0,
         "decision": "kept" if i in kept else "duplicate" if s == "yes" else "failed"}
        for i, s in ATTEMPTS.items()
    ]  # fmt: skip
    write_jsonl(directory / "scores.jsonl", scores)
    write_jsonl(directory / "kept.jsonl", [*map(_row, kept), _row("demonstration-3")])
    rejected = dict.fromkeys(REASONS, 0) | {"failed": 1, "duplicate": 1}
    record = {
        "round": 1, "rollout": {"played": 4, "success": 0.75, "unknown": 0, "reward_mean": 0.75}, "diversity": {},
        "selection": {"kept": 2, "cutoff": 1.0, "rejected": rejected}, "train": {"rows": 3}, "eval": FIGURES,
    }  # fmt: skip
    write_json(directory / "metrics.json", record)
    commit_round(directory, tokenizer="f" * 64)
    write_jsonl(path / "metrics.jsonl", [record])
    metrics = {"base": FIGURES, "best": FIGURES, "best_round": 1, "rounds": 1, "conclusion": "not distinguishable: ..."}
    write_json(path / "metrics.json", metrics)
    for file in EMBEDDED.iterdir():
        if file.name != "README.md" and not (adapter and file.name in ("config.json", "model.safetensors")):
            shutil.copyfile(file, best / file.name)
    if adapter:
        (best / "adapter_model.safetensors").write_bytes(b"\0")
        write_json(best / "adapter_config.json", {"base_model_name_or_path": str(EMBEDDED), "r": 2})
    write_manifest(path, [*best.iterdir(), path / "metrics.json", path / "config.yaml"])
    return config


def _row(trajectory):
    user, said = {"role": "user", "content": "Work out 1 + 1."}, {"role": "assistant", "content": "#### 2"}
    return {
        "id": trajectory, "problem_id": trajectory.split("-")[1], "turn": 0, "prompt": [user], "completion": [said],
        "source": "demonstration" if trajectory.startswith("d") else "self", "input_ids": [1, 2], "labels": [-100, 2],
        "reward": 1.0, "weight": 1.0,
    }  # fmt: skip


def model_files(path):
    """Return the files of a finished run's model, by name."""
    names = [name for name in read_json(path / "manifest.json")["files"] if name.startswith("best/")]
    return {name.removeprefix("best/"): (path / name).read_bytes() for name in names}
