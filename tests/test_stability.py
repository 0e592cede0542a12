"""Spikes and plateaus."""

import os

import torch

from nanotrain.__main__ import main
from nanotrain.stability import SAMPLED, make_deterministic, plateau, sampled, spiked, update_ratios
from nanotrain.stages import pretrain
from tests.stages.test_pretrain import flags


def test_spikes_need_a_full_window():
    assert not spiked([1.0] * 127, 99.0, 6.0)
    assert spiked([1.0, 1.1] * 64, 1.5, 6.0) and not spiked([1.0, 1.1] * 64, 1.3, 6.0) and not spiked([1.0, 1.1] * 64, 99.0, 0.0)


def test_a_plateau_is_two_windows_of_nearly_equal_losses():
    assert plateau([2.0] * 20, 10) == (2.0, 2.0) and plateau([3.0] * 5 + [2.0] * 5, 5) is None
    assert plateau([2.0] * 19, 10) is None and plateau([2.0] * 20, 0) is None


def test_update_ratios_are_those_of_the_whole_tensors():
    draws = torch.Generator().manual_seed(0)
    wide, small = torch.randn(512, 1024, generator=draws), torch.randn(7, generator=draws)
    weights = {"wide": wide, "small": small, "still": torch.ones(3), "zero": torch.zeros(2)}
    weights["wide"][:, ::2] *= 100  # every second column: an even spacing would see these alone
    old = {name: weight.clone() for name, weight in weights.items()}
    before = sampled(weights)
    assert max(map(len, before)) <= SAMPLED and before[0].data_ptr() != weights["wide"].data_ptr()
    weights["wide"] += 0.01 * torch.randn(512, 1024, generator=draws)
    weights["small"] *= 1.5
    got = update_ratios(before, weights).tolist()
    whole = {name: float((weights[name] - old[name]).norm() / old[name].norm()) for name in ("wide", "small")}
    assert abs(got[0] / whole["wide"] - 1) < 0.02 and abs(got[1] / whole["small"] - 1) < 1e-6 and got[2:] == [0, 0]
    weights["zero"] += 1
    assert update_ratios(before, weights).tolist()[3] == float("inf")


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
