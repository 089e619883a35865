"""What transformers computes and generates with every model of CONFIGS, in float64: made once for all tests."""

from pathlib import Path

import pytest
import torch

from tests.workers.model.families.hugging_face import CONFIGS, Batch, continued, reference


@pytest.fixture(scope="session")
def in_float64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each model: its Reference, and the continuations of PROMPTS."""
    folder = tmp_path_factory.mktemp("float64")
    for name in CONFIGS:
        torch.save((reference(name, torch.float64, Batch.ragged()), continued(name)), folder / f"{name}.pt")
    return folder
