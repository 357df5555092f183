"""A picture of each experiment's result, from the dictionary that its JSON file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
_WIDTH, _HEIGHT = 4.6, 3.4  # inches, of a panel


def plot_experiment(result: Result, path: Path) -> None:
    """Write the PNG of one experiment (``experiment`` names it)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _PANELS[result["experiment"]]
    figure = Figure(figsize=(_WIDTH * len(panels), _HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, result)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(10)
    figure.savefig(path, dpi=130)


def _names(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The key's values, each once, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def _lines(axes: Any, result: Result, by: str, x: str, y: str) -> None:
    """A line for each value of ``by``, ``y`` over ``x``."""
    for name in _names(result["rows"], by):
        points = sorted((row[x], row[y]) for row in result["rows"] if row[by] == name)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=str(name))
    axes.set_xlabel(x.replace("_", " "))
    axes.legend(fontsize=7, frameon=False)


def _curves(axes: Any, result: Result) -> None:
    """Validation loss over steps; runs of one kind in one colour, those with a schedule of fewer steps dotted."""
    longest = max(row["steps"] for row in result["rows"])
    for number, kind in enumerate(_names(result["rows"], "kind")):
        for row in result["rows"]:
            if row["kind"] != kind:
                continue
            whole = row["steps"] == longest
            label = kind if row["seed"] == 0 and whole else None
            points = row["curve"]
            axes.plot(*zip(*points, strict=True), "-" if whole else ":", color=f"C{number}", linewidth=1, label=label)
    losses = [loss for row in result["rows"] for step, loss in row["curve"] if step >= longest / 8]
    if losses:
        axes.set_ylim(min(losses) - 0.03, max(losses))
    axes.set_title("validation loss, nats per token")
    axes.set_xlabel("steps")
    axes.legend(fontsize=7, frameon=False)


def _ratios(axes: Any, result: Result) -> None:
    """Steps in which MoT reaches each kind's final loss, over those of that kind."""
    found = result["summary"]["step_ratio"]
    for number, spread in enumerate(found.values()):
        values = [value for value in spread["values"] if value is not None]
        axes.plot([number] * len(values), values, "o", color=f"C{number}")
    axes.set_xticks(range(len(found)), list(found))
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set_ylim(0, 1.05)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_title("steps to the other's final loss, of its steps")


def _entropies(axes: Any, result: Result) -> None:
    for row in result["rows"]:
        steps, entropy, _ = zip(*row["curve"], strict=True)
        axes.plot(steps, entropy, label=row["temperature"], linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_title("entropy of the mixing weights, over log G")
    axes.legend(fontsize=7, frameon=False)


def _costs(axes: Any, result: Result) -> None:
    rows = result["rows"]
    best = min(row["mixed"] for row in rows)
    bars = {
        "mixed, over the best": [row["mixed"] / best for row in rows],
        "private, over mixed": [row["private_over_mixed"] for row in rows],
        "T = 0, over mixed": [row["unmixed_over_mixed"] for row in rows],
    }
    for number, (label, values) in enumerate(bars.items()):
        drawn = axes.barh([place + number * 0.27 for place in range(len(rows))], values, height=0.25, label=label)
        axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=2, fontsize=7)
    axes.set_yticks([place + 0.27 for place in range(len(rows))], [row["temperature"] for row in rows], fontsize=8)
    axes.set_xlim(0, 1.8 * max(max(values) for values in bars.values()))  # room for the legend
    axes.set_title("perplexity ratios")
    axes.legend(fontsize=7, frameon=False, loc="right")


def _live(axes: Any, result: Result) -> None:
    _lines(axes, result, "fill", "live", "over_training")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axvline(result["summary"]["group_size"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("live members (dotted: as in training)")
    axes.set_title("perplexity over that of full groups, by fill")


def _distances(axes: Any, result: Result) -> None:
    rows = [{**row, "loss": row["loss"] - row["loss_at_equal"]} for row in result["rows"]]
    _lines(axes, {"rows": rows}, "temperature", "distance", "loss")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("positions between the furthest members")
    axes.set_title("nats per token over equal positions")


def _private_loss(axes: Any, result: Result) -> None:
    _lines(axes, result, "checkpoint", "temperature", "over_mixed")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_ylim(0.97, 1.6)
    axes.set_title("private perplexity, over mixing")


def _private_experts(axes: Any, result: Result) -> None:
    _lines(axes, result, "checkpoint", "temperature", "experts_per_token")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=0)
    axes.set_title(f"experts a token, of {result['summary']['experts']}, skip below 0.01")


def _ways(axes: Any, result: Result) -> None:
    """What each way to tune costs mixing, and what T = 0 then costs over the control's mixing."""
    for way in result["summary"]["ways"]:
        x, y = way["mixed_over_control"], way["unmixed"]["over_control"]
        axes.plot([x], [y], "*" if way["checkpoint"] == result["summary"]["best"] else "o")
        axes.annotate(way["checkpoint"], (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.axvline(1.01, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("mixing, over the control")
    axes.set_title("T = 0, over the control's mixing")


def _which_crowd(axes: Any, result: Result) -> None:
    rows = [row for row in result["rows"] if row["crowd"] != "first"]
    _lines(axes, {"rows": rows}, "temperature", "crowd", "over_mixed")
    axes.set_xlabel("crowd")
    axes.set_title("private perplexity over mixing, by crowd; by T")


def _crowd_sizes(axes: Any, result: Result) -> None:
    rows = [row for row in result["rows"] if row["crowd"] == "first"]
    _lines(axes, {"rows": rows}, "temperature", "members", "over_mixed")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("members of the crowd")
    axes.set_title("private perplexity over mixing, by size; by T")


_PANELS: dict[str, tuple[Callable[[Any, Result], None], ...]] = {
    "steps": (_curves, _ratios),
    "kinds": (_curves, _ratios),
    "learnable": (_entropies, _costs),
    "group-size": (_live,),
    "distance": (_distances,),
    "private-temperature": (_private_loss, _private_experts, _ways),
    "crowds": (_which_crowd, _crowd_sizes),
}
