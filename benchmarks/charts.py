"""How the benchmarks' charts look."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, RED, ORANGE, GREY = "#0072b2", "#d55e00", "#e69f00", "#555555"


def panels(count: int, width: float = 5, height: float = 4.2):
    """(figure, axes) of some charts side by side."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(1, count, figsize=(width * count, height), layout="constrained")


def log_log(axis, xlabel: str, ylabel: str) -> None:
    """Both axes logarithmic, with plain numbers and a faint grid."""
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:,g}"))
    axis.grid(which="major", color="#eeeeee")
    axis.set_axisbelow(True)


def save(figure, file) -> None:
    """As PNG, and closed."""
    figure.savefig(file, dpi=150)
    plt.close(figure)
