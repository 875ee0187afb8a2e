"""What the tests of engines share."""

import pytest
from helpers.vllm_double import Double


@pytest.fixture
def doubles():
    """Return what makes vLLM doubles, which are closed after the test."""
    made = []
    yield lambda *args, **kwargs: made.append(Double(*args, **kwargs)) or made[-1]
    for double in made:
        double.close()
