"""A dataset of sums as rows, loaded, and what tests ask about its splits."""

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.loading import load_splits


def splits(dataset, *, dev=0, test=0, **keys):
    data = DataSettings(dataset_name=str(dataset), **keys)
    return load_splits(data, EvaluationSettings(eval_dev_problems=dev, eval_test_problems=test))


def everything(parts):
    """Return all demonstrations of a dataset, sorted by their prompts."""
    return sorted((*parts.train, *parts.dev, *parts.test), key=lambda d: str(d.problem.prompt))


def shared_prompts(parts):
    """Return the ids of training problems that are also held out."""
    return {d.problem.id for d in parts.train} & {d.problem.id for d in parts.held_out}


def many(n=400):
    return [{"prompt": f"{i} + {i}?", "completion": str(2 * i), "answer": str(2 * i)} for i in range(n)]
