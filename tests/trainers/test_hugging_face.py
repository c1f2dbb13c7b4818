"""The recipe of the Hugging Face Trainer."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from plywise import ProxProp

from .page import recipe
from .promises import EPOCHS, Promises, resumed, same_bits, trained


@pytest.fixture(autouse=True, scope="module")
def _transformers() -> None:
    """Only where its tests run: it takes seconds to import."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")


class TestHuggingFaceTrainer(Promises):
    section = "Hugging Face Trainer"


def test_its_own_schedule(tmp_path: Path) -> None:
    from transformers import get_linear_schedule_with_warmup

    steps = 2 * EPOCHS
    names = recipe("Hugging Face Trainer", folder=str(tmp_path), make_scheduler=lambda optimizer: None)
    plain = recipe(
        "Plain loop",
        folder=str(tmp_path),
        make_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, 0, steps),
    )
    assert same_bits(trained(names, ProxProp()), trained(plain, ProxProp()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_within_an_epoch(accumulate: int, tmp_path: Path) -> None:
    names = recipe("Hugging Face Trainer", folder=str(tmp_path), accumulate=accumulate)

    arguments = names["TrainingArguments"]

    def every_third_step(*args: Any, **settings: Any) -> Any:
        settings |= {"save_strategy": "steps", "save_steps": 3}
        return arguments(*args, **settings)

    names["TrainingArguments"] = every_third_step
    unbroken = trained(names, ProxProp())
    for checkpoint in tmp_path.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-3":
            shutil.rmtree(checkpoint)
    assert same_bits(resumed(names, ProxProp()), unbroken)
