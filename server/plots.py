"""Pictures of results, for people. matplotlib is an optional extra: ``pip install 'motserve[plot]'``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_BROKEN, _CHANCE = "#b3432f", "#3a6ea5"


def check_plotting() -> None:
    """Raises ValueError when there is nothing to draw with, before any work is done."""
    if find_spec("matplotlib") is None:
        raise ValueError("plot: matplotlib is not installed; pip install 'motserve[plot]'")


def plot_audit(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Token recovery, guesses between two secrets and changed texts, a bar each a mode (keys as ``audit`` prints)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("token_recovery_rate", "next token recovered", results[0]["chance"]),
        ("distinguish_accuracy", "two secrets told apart", 0.5),
        ("victim_text_changed", "victim's text changed", 0.0),
    )
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    names = [str(result["mode"]).replace("_", " ") for result in results]
    for axes, (key, title, chance) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        values = [float(result[key]) for result in results]
        colours = [_BROKEN if value > chance + 0.1 else _CHANCE for value in values]
        bars = axes.barh(names, values, color=colours, height=0.62)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.axvline(chance, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.18)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results[0]['trials']} trials each; dotted: chance", fontsize=9)
    figure.savefig(path, dpi=130)


def plot_serve(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Output tokens a second, time to the first token and between tokens against concurrency, a line for each share of
    private requests (keys as ``bench serve`` prints); solid p50, dotted p99. Settings nobody answered are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("output tokens/s", ("output_tokens_per_second",)),
        ("seconds to the first token", ("ttft_p50", "ttft_p99")),
        ("seconds between tokens", ("itl_p50", "itl_p99")),
    )
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for number, share in enumerate(sorted({result["private_share"] for result in results})):
            for key, style in zip(keys, ("-", ":"), strict=False):
                points = sorted(
                    (result["concurrency"], result[key])
                    for result in results
                    if result["private_share"] == share and result[key] is not None
                )
                label = f"private {share:.3g}" if style == "-" else None
                x, y = [point[0] for point in points], [point[1] for point in points]
                axes.plot(x, y, style, color=f"C{number}", marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests under way", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
