"""A fixture that writes recipes."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], str]:
    """Return a function that writes a recipe and returns its path."""

    def write_recipe(content: str | bytes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_recipe
