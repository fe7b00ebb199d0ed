"""The sum of all cases; every test asserts its own number."""

from __future__ import annotations

import test_fuzz_arguments
import test_fuzz_checkpoints
import test_fuzz_files
import test_fuzz_prompts
import test_fuzz_recipes
import test_fuzz_settings

MODULES = (
    test_fuzz_arguments,
    test_fuzz_checkpoints,
    test_fuzz_files,
    test_fuzz_prompts,
    test_fuzz_recipes,
    test_fuzz_settings,
)


def test_two_thousand_cases_are_run() -> None:
    tests = {
        name: test.cases
        for module in MODULES
        for name, test in vars(module).items()
        if name.startswith("test_") and hasattr(test, "cases")
    }
    assert sum(tests.values()) >= 2_000
