"""Threads that share a model, or run two, never use each other's masks."""

from __future__ import annotations

from fresh import in_fresh_process
from models import TOLERANCE
from threaded import one_model, one_model_compiled_by_blocks, two_models


def test_one_model_in_several_threads_takes_turns() -> None:
    wrong = in_fresh_process(one_model)
    assert wrong.numel() == 30
    assert float(wrong.max()) < TOLERANCE


def test_two_threads_run_two_models() -> None:
    assert in_fresh_process(two_models).tolist() == [1, 1]


def test_two_threads_that_use_one_model_never_mix_their_prompts() -> None:
    assert float(in_fresh_process(one_model_compiled_by_blocks).max()) < 0.05
