"""Summaries of results: means over seeds with intervals, paired differences to a baseline, tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.intervals import half_width

if TYPE_CHECKING:
    import xarray

STATISTICS = ("mean", "stderr", "low", "high")


def summarise(
    results: "xarray.Dataset",
    *,
    over: str = "seed",
    baseline: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    """Means over seeds, with standard errors and 95 % intervals (Student's t), for every point.

    >>> import jax
    >>> from dpo_jax import sweep
    >>> def run(key, *, loss):
    ...     return {"reward": jax.random.normal(key) + (1.0 if loss == "new" else 0.0)}
    >>> results = sweep.grid(run, jax.random.key(0), num_seeds=50, loss=["dpo", "new"])
    >>> summary = summarise(results, baseline={"loss": "dpo"})
    >>> print(summary.reward_difference.sel(loss="new", statistic="mean").item())
    1.0

    Args:
      results: what `grid` returned.
      over: the dimension of independent repetitions.
      baseline: values of some axes, for instance `{"loss": "dpo"}`. For each result there is then also its
        `_difference` to what was found there, paired by seed.

    Returns:
      The same variables with a dimension `statistic` (`mean`, `stderr`, `low`, `high`) in place of `over`. Runs that
      are NaN do not count; `finished` is the share of runs without any NaN. With a single run there is no interval
      (NaN).

    Raises:
      ValueError: there is no such dimension, or the baseline is no point of the grid.
    """
    if over not in results.dims:
        raise ValueError(f"results have no dimension {over!r}; they have {', '.join(map(str, results.dims))}")
    measured = results.drop_attrs()
    if baseline is not None:
        try:
            base = measured.sel(baseline, drop=True)
        except KeyError as problem:
            raise ValueError(f"baseline {dict(baseline)} is no point of the grid: {problem}") from problem
        differences = measured - base
        measured = measured.assign({f"{name}_difference": values for name, values in differences.items()})
    summary = measured.map(_statistics, over=over)
    return summary.assign(finished=_finished(results, over)).assign_coords(statistic=list(STATISTICS))


def rows(summary: "xarray.Dataset", names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row for each point: its values of the axes, and every statistic of some results, as `reward_mean` and so on.

    `pandas.DataFrame(rows(summary))` is a table.

    Args:
      summary: what `summarise` returned; of results that are numbers.
      names: which results; all of them by default.
    """
    chosen = [name for name in summary.data_vars if "statistic" in summary[name].dims] if names is None else names
    return [
        point
        | {
            f"{name}_{statistic}": found[name].sel(statistic=statistic).item()
            for name in chosen
            for statistic in STATISTICS
        }
        for point, found in points(summary)
    ]


def latex(summary: "xarray.Dataset", names: Sequence[str], *, digits: int = 3) -> str:
    """A LaTeX table with a row for each point: means, and half the width of their intervals.

    Args:
      summary: what `summarise` returned.
      names: the results to show, one column each.
      digits: after the decimal point.
    """
    axes = [str(axis) for axis in _axes(summary)]
    lines = []
    for point, found in points(summary):
        numbers = (interval(found[name], digits=digits).replace("±", r"\pm") for name in names)
        lines.append(" & ".join([*map(_escaped, point.values()), *(f"${number}$" for number in numbers)]))
    head = " & ".join(_escaped(name) for name in (*axes, *names))
    columns = "l" * len(axes) + "r" * len(names)
    body = " \\\\\n".join(lines)
    return f"\\begin{{tabular}}{{{columns}}}\n\\hline\n{head} \\\\\n\\hline\n{body} \\\\\n\\hline\n\\end{{tabular}}\n"


def points(summary: "xarray.Dataset") -> Iterator[tuple[dict[str, Any], "xarray.Dataset"]]:
    """Every point of the grid, by its values of the axes, with what was found there."""
    axes = _axes(summary)
    for place in np.ndindex(*(summary.sizes[axis] for axis in axes)):
        found = summary.isel(dict(zip(axes, place, strict=True)))
        yield {str(axis): found[axis].item() for axis in axes}, found


def interval(statistics: "xarray.DataArray", *, digits: int = 3) -> str:
    """A mean, and half the width of its interval if there is one."""
    mean, low, high = (statistics.sel(statistic=name).item() for name in ("mean", "low", "high"))
    half = "" if np.isnan(high) else f" ± {(high - low) / 2:.{digits}f}"
    return f"{mean:.{digits}f}{half}"


def _statistics(values: "xarray.DataArray", *, over: str) -> "xarray.DataArray":
    import xarray

    if over not in values.dims:
        return values
    values = values.astype(float)
    num, mean = values.count(over), values.mean(over)
    spread = ((values - mean) ** 2).sum(over)
    stderr = np.sqrt(spread / (num - 1).where(num > 1) / num)
    half = half_width(stderr, num)
    statistics: Any = [mean, stderr, mean - half, mean + half]
    return xarray.concat(statistics, "statistic")


def _finished(results: "xarray.Dataset", over: str) -> "xarray.DataArray":
    """The share of runs that have no NaN anywhere."""
    whole = None
    for values in results.data_vars.values():
        axes = {over, *(str(name) for name in _axes(results))}
        number = values.notnull().all([name for name in values.dims if name not in axes])
        whole = number if whole is None else whole & number
    assert whole is not None
    return whole.mean(over)


def _axes(summary: "xarray.Dataset") -> list[Any]:
    return [name for name in summary.indexes if name not in ("statistic", "seed")]


def _escaped(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(f"\\{letter}" if letter in "&%$#_{}" else letter for letter in text)
