"""Spikes and plateaus."""

import os

import torch

from nanotrain.__main__ import main
from nanotrain.stability import make_deterministic, plateau, spiked
from nanotrain.stages import pretrain
from tests.stages.test_pretrain import flags


def test_spikes_need_a_full_window():
    assert not spiked([1.0] * 127, 99.0, 6.0)
    assert spiked([1.0, 1.1] * 64, 1.5, 6.0) and not spiked([1.0, 1.1] * 64, 1.3, 6.0) and not spiked([1.0, 1.1] * 64, 99.0, 0.0)


def test_a_plateau_is_two_windows_of_nearly_equal_losses():
    assert plateau([2.0] * 20, 10) == (2.0, 2.0) and plateau([3.0] * 5 + [2.0] * 5, 5) is None
    assert plateau([2.0] * 19, 10) is None and plateau([2.0] * 20, 0) is None


def test_deterministic_mode_is_switched_on_and_its_cost_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    try:
        assert make_deterministic(lambda: sum(range(1000))) > 0 and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cublas_is_told_before_anything_is_built(data, tmp_path, monkeypatch):
    """It hears of its workspace at its first product or never."""
    seen = []

    def training(*arguments):
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise ValueError("far enough")

    monkeypatch.setattr(pretrain, "Training", training)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what the run sets is taken back
    for flag in ("false", "true"):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        assert main(flags(data, tmp_path / flag, "--train.steps=1", f"--run.deterministic={flag}")) == 2
    assert seen == [None, ":4096:8"]
