"""What schemathesis loads beside the OpenAPI page: cases that mean well ask for a model there is.

Otherwise all but a few would end with "there is no such model".
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import GenerationMode

from serving.server import MODEL


@schemathesis.hook
def before_call(context: Any, case: Any, options: Any) -> None:
    """Name the model that is served in a case that is valid."""
    is_valid = case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE
    if is_valid and isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL
