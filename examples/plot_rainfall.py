"""
Rainfall: predicting a week of one station from six weeks
=========================================================

This example predicts the daily rain of the next week in Seattle from the six weeks before. A `ConvLSTM` reads
six weeks, each as a one-dimensional field of seven days, and predicts the seventh. It is trained with SGD and
with `SalpSGD`, the optimizer of the papers on rainfall, and compared with three predictions without trained
weights: no rain, the week before, and the mean of the month. The data are the daily values from 2012 to 2015
in the package *vega_datasets* (NOAA, public domain); the last year is used for the test only.

When we wrote this page, the networks were no better than the mean of the month: the past of one station says
little about the rain of the next week. The data of the papers are not public.
"""

# %%
# The amounts of rain are skewed, so the network and the errors use ``log(1 + mm)``.
import importlib.util
import math
from datetime import date
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from plywise.data.tables import read_rows
from plywise.nn import ConvLSTM
from plywise.optim import SalpSGD

torch.set_num_threads(1)
WEEKS, STEPS, BATCH, RATE = 6, 100, 64, 0.1


def read_rain(path: Path) -> tuple[Tensor, list[date]]:
    """Return ``log(1 + mm)`` of each day, and the days."""
    rows = read_rows(path)
    days = [date(*(int(part) for part in row["date"].split("/"))) for row in rows]
    return torch.tensor([math.log1p(float(row["precipitation"])) for row in rows]), days


def cut_windows(rain: Tensor) -> Tensor:
    """Return the seven weeks from each day on, (WEEKS + 1, windows, 1, 1, 7); the last week is the target."""
    return rain.unfold(0, 7 * (WEEKS + 1), 1).unflatten(1, (WEEKS + 1, 7)).transpose(0, 1)[:, :, None, None]


# %%
# The model is a ConvLSTM whose kernel covers the neighbouring days, and a 1×1 convolution that maps its state
# to the next week.
class NextWeek(nn.Module):
    """Predicts the next week."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.read = ConvLSTM(1, 6, kernel_size=3), nn.Conv2d(6, 1, 1)

    def forward(self, weeks: Tensor) -> Tensor:
        """Map weeks (T, N, 1, 1, 7) to the next week."""
        return self.read(self.memory(weeks)[1][0])


def train(salps: int, weeks: Tensor) -> nn.Module:
    """Train a network with SGD (one salp), or with a chain of salps around the step of SGD."""
    torch.manual_seed(0)
    model = NextWeek()
    optimizer = SalpSGD(model.parameters(), lr=RATE, total_steps=STEPS, salps=salps, radius=0.01)
    for _ in range(STEPS):
        part = weeks[:, torch.randint(weeks.shape[1], (BATCH,))]

        def closure(part: Tensor = part) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(part[:-1]), part[-1])
            loss.backward()
            return loss

        optimizer.step(closure)
    return model


# %%
# The errors on the last year, and a plot of its first months.
def compare(rain: Tensor, days: list[date]) -> None:
    """Train on all years except the last; print and plot the errors of all predictions for the last year."""
    start = days.index(date(2015, 1, 1))
    weeks, test = cut_windows(rain[:start]), cut_windows(rain[start:])
    truth = test[-1]
    means = [rain[[d.month == m and i < start for i, d in enumerate(days)]].mean() for m in range(1, 13)]
    month_means = torch.stack([means[d.month - 1] for d in days[start:]])
    predictions = {
        "no rain": torch.zeros_like(truth),
        "the week before": test[-2],
        "mean of the month": cut_windows(month_means)[-1],
    }
    for name, salps in (("ConvLSTM, SGD", 1), ("ConvLSTM, SalpSGD", 4)):
        model = train(salps, weeks)
        with torch.no_grad():
            predictions[name] = model(test[:-1])
    for name, prediction in predictions.items():
        print(f"{name:18} mean squared error {mse_loss(prediction, truth):.3f}")
    plt.figure(figsize=(8, 3.2), layout="constrained")
    plt.plot(truth[::7].flatten()[:120], "k", linewidth=0.7, label="measured")
    for name in ("mean of the month", "ConvLSTM, SGD", "ConvLSTM, SalpSGD"):
        plt.plot(predictions[name][::7].flatten()[:120], linewidth=1, label=name)
    plt.xlabel("days from 12 February 2015")
    plt.ylabel("log(1 + mm)")
    plt.legend()


# %%
# Run everything if the package is installed.
package = importlib.util.find_spec("vega_datasets")
if package is None or package.origin is None:
    print("Skipped: the series is in the package vega_datasets (pip install vega_datasets).")
else:
    compare(*read_rain(Path(package.origin).parent / "_data" / "seattle-weather.csv"))
    plt.show()
