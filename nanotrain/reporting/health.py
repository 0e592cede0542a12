"""Verdicts on a run's health: what was measured, beside the band it should lie in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanotrain.reporting.history import History


@dataclass(frozen=True)
class Verdict:
    """One judgement in words."""

    name: str
    state: str
    """`OK`, `look` (outside its band) or `no data`."""
    measured: str
    band: str


def verdicts(h: History) -> list[Verdict]:
    """Every judgement that this version knows, in a fixed order; what a run did not record is `no data`."""
    judged = []
    for name, band, judge in CHECKS:
        found = judge(h)
        state, measured = ("no data", "not recorded") if found is None else ("OK" if found[0] else "look", found[1])
        judged.append(Verdict(name, state, measured, band))
    return judged


Judgement = tuple[bool, str] | None
"""Whether inside the band, and what was measured; None where nothing was."""


def _gradient_norm(h: History) -> Judgement:
    norms = _finite(h.steps["grad_norm"])
    if not len(norms):
        return None
    inside = np.mean((norms >= 0.1) & (norms <= 10))
    return bool(inside >= 0.95), f"{_percent(inside)} of steps inside; median {np.median(norms):.2g}, largest {norms.max():.3g}"


def _clipped(h: History) -> Judgement:
    clipped = _finite(h.steps["clipped"])
    return (bool(clipped.mean() < 0.05), f"{_percent(clipped.mean())} of steps") if len(clipped) else None


def _update_ratio(h: History) -> Judgement:
    ratios = np.concatenate([_finite(h.ratios[name][len(h.ratios) // 10 :]) for name in h.ratios.names()] or [np.empty(0)])
    if not len(ratios):
        return None
    median, inside = np.median(ratios), np.mean((ratios >= 1e-3) & (ratios <= 1e-2))
    return bool(1e-3 <= median <= 1e-2), f"median {100 * median:.2g}%; {_percent(inside)} of parameters and steps inside"


def _data_wait(h: History) -> Judgement:
    return _share_of_time(h, "data_s")


def _communication(h: History) -> Judgement:
    return _share_of_time(h, "communication_s", 0.2)


def _share_of_time(h: History, column: str, limit: float = 0.05) -> Judgement:
    part, whole = h.steps[column], h.steps["step_s"]
    both = np.isfinite(part) & np.isfinite(whole)
    if not whole[both].sum() > 0:
        return None
    share = part[both].sum() / whole[both].sum()
    return bool(share < limit), f"{_percent(share)} of the time of steps"


def _utilisation(h: History) -> Judgement:
    busy = _finite(h.gpu["gpu_utilisation"])
    return (bool(80 <= busy.mean() <= 95), f"mean {busy.mean():.0f}%, lowest {busy.min():.0f}%") if len(busy) else None


def _temperature(h: History) -> Judgement:
    celsius = _finite(h.gpu["gpu_celsius"])
    if not len(celsius):
        return None
    reasons = f"; throttled: {', '.join(h.throttled)}" if h.throttled else ""
    return bool(celsius.max() <= 85), f"highest {celsius.max():.0f} °C{reasons}"


def _skipped(h: History) -> Judgement:
    skipped, steps = h.steps["skipped"], h.steps["step"]
    if not h.steps.has("skipped"):
        return None
    bad = steps[skipped > 0]
    return not len(bad), f"{len(bad):,} of {len(steps):,} steps" + (f", the first at step {bad[0]:,.0f}" if len(bad) else "")


def _spikes(h: History) -> Judgement:
    if not h.events:
        return None
    spikes = h.of("spike")
    return not spikes, f"{len(spikes)}" + (f", the last at step {spikes[-1].get('step', '?')}" if spikes else "")


def _throughput(h: History) -> Judgement:
    rates = _finite(h.steps["tokens_per_s"][1:])  # the first step compiles and warms up
    if len(rates) < 20:
        return None
    late, whole = np.median(rates[-max(5, len(rates) // 10) :]), np.median(rates)
    return bool(late >= 0.9 * whole), f"{late / whole - 1:+.1%} in the last tenth of the run against all of it"


def _longest_step(h: History) -> Judgement:
    seconds = _finite(h.steps["step_s"][1:])
    if len(seconds) < 5:
        return None
    times = seconds.max() / max(np.median(seconds), 1e-9)
    return bool(times < 5), f"longest {seconds.max():.3g} s, {times:.1f} times the median"


def _loss_at_end(h: History) -> Judgement:
    losses = _finite(h.steps["loss"])
    tenth = len(losses) // 10
    if tenth < 5:
        return None
    before, after = losses[-2 * tenth : -tenth].mean(), losses[-tenth:].mean()
    change = after / before - 1 if before else 0.0
    word = "falling" if change < -0.005 else "rising" if change > 0.005 else "a plateau"
    return word == "falling", f"{word}: {before:.4g} to {after:.4g} ({change:+.1%}) over the last two tenths"


CHECKS: tuple[tuple[str, str, Callable[[History], Judgement]], ...] = (
    ("Loss at the end", "falls by more than 0.5% from a tenth of the run to the next", _loss_at_end),
    ("Gradient norm", "0.1 to 10 in at least 95% of steps", _gradient_norm),
    ("Clipped steps", "under 5% of steps", _clipped),
    ("Update over weight", "median of 0.1% to 1%", _update_ratio),
    ("Non-finite steps", "none skipped", _skipped),
    ("Loss spikes", "none", _spikes),
    ("Wait for data", "under 5% of the time of steps", _data_wait),
    ("Communication", "under 20% of the time of steps", _communication),
    ("Throughput", "drops by less than 10%", _throughput),
    ("Longest step", "under 5 times the median", _longest_step),
    ("GPU utilisation", "80% to 95%", _utilisation),
    ("GPU temperature", "at most 85 °C", _temperature),
)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share in (0, 1) else f"{100 * share:.1f}%"
