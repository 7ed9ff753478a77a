"""Shared fixtures: the reference models under tests/fixtures and a seeded global generator."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def golden():
    """Reads a reference model: `golden(name) -> (description dict, {"weights.*" | "input.*" | "output.*": tensor})`."""

    def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        return json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")

    return load


@pytest.fixture(autouse=True)
def seed_everything():
    """Every test starts from the same global torch seed."""
    torch.manual_seed(0)
