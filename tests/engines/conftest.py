"""Cases that run inside vLLM, SGLang and Ray; `make test-engines` starts them."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The ordinary tests leave this folder out: no engine is installed in their environment."""
    return None if config.rootpath == HERE else True
