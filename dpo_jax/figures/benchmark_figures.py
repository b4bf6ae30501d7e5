"""How fast it is: beside what the machine can do, and as more and more runs are stacked."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_jax.figures.style import GREY, LINE_STYLES, PALETTE, as_written, named, panels

MARKERS = "osD^vPX*"


def roofline(
    peaks: Mapping[str, float], bandwidth: float, workloads: Mapping[str, tuple[float, float]], *, title: str = ""
) -> Figure:
    """Arithmetic done against arithmetic per byte moved, under the roofs that the machine sets.

    Args:
      peaks: FLOP/s of a big matrix product, by what it is called; one roof each.
      bandwidth: bytes per second of a big copy: the slope that leads up to the roofs.
      workloads: by name, the FLOP for each byte that has to be moved, and the FLOP/s achieved.
      title: what stands above.
    """
    figure, (axes,) = panels(9.0, 5.0, columns=1, legend_width=2.9)
    highest = max(peaks.values())
    intensities = [intensity for intensity, _ in workloads.values()]
    ends = np.array([min([*intensities, 1.0]) / 4, 8 * max(*intensities, highest / bandwidth)])
    for (name, peak), style in zip(peaks.items(), itertools.cycle(LINE_STYLES), strict=False):
        x = np.array([max(ends[0], peak / bandwidth), ends[1]])
        axes.plot(x, [peak, peak], color="black", linestyle=style, label=named(f"{name}: {short(peak)}FLOP/s"))
    slope = np.array([ends[0], highest / bandwidth])
    axes.plot(slope, bandwidth * slope, color=GREY, label=f"copy: {short(bandwidth)}B/s")
    for i, (name, point) in enumerate(workloads.items()):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        label = named(f"{name}: {short(point[1])}")
        axes.plot(*point, marker, color=colour, markersize=7, linestyle="none", label=label)
    axes.set(xscale="log", yscale="log", xlim=ends, ylabel="Achieved (FLOP/s)", title=title)
    axes.set_xlabel("Arithmetic intensity: least FLOP per least byte moved")
    axes.set_ylim(min(flops for _, flops in workloads.values()) / 3, 3 * highest)
    _name_points(axes, workloads)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5, labelspacing=0.8)
    axes.grid(alpha=0.3)
    return as_written(figure)


def cost_per_step(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, title: str = "") -> Figure:
    """What an optimizer step of one run costs, against how many runs are made at once.

    Args:
      curves: by name, the numbers of runs, and the microseconds per step and run.
      title: what stands above.
    """
    figure, (axes,) = panels(8.4, 4.6, columns=1, legend_width=2.5)
    for i, (name, (numbers, microseconds)) in enumerate(curves.items()):
        axes.plot(
            numbers,
            microseconds,
            color=PALETTE[i % len(PALETTE)],
            linestyle=LINE_STYLES[i % len(LINE_STYLES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            label=named(name),
        )
    axes.set(xscale="log", yscale="log", xlabel="How many at once", ylabel="µs per optimizer step and run", title=title)
    numbers = sorted({number for numbers, _ in curves.values() for number in numbers})
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.3, which="both", axis="y")
    axes.grid(alpha=0.3, axis="x")
    return as_written(figure)


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]], gap: float = 0.05) -> None:
    """Writes names to the right of points, none over another; `gap` is a share of the height of the axes."""
    low, high = np.log(axes.get_ylim())
    free = high
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        height = min(np.log(y), free)
        axes.annotate(
            name,
            (x, y),
            xytext=(1.35 * x, np.exp(height)),
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6},
        )
        free = height - gap * (high - low)


def short(value: float) -> str:
    """A number with three digits and a prefix: 12.3 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
