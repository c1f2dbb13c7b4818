"""
Rainfall: a week of one station from the six weeks before
=========================================================

Rain in Seattle, day by day from 2012 to 2015, as the package *vega_datasets* carries it (NOAA, public
domain). A week is a field of one dimension, seven days wide; a `ConvLSTM` reads six of them and predicts the
next one. It is trained by SGD and by `SalpSGD`, the optimizer of the papers on rainfall, and compared with
three guesses that learn no weights: no rain, the week before, and the mean of the month. The last year is
never trained on.

In the runs that this page was written after, the networks only found what the mean of the month knows: one
station's past says little of the next week's rain. The papers' own data are not public.
"""

# %%
# Depths of rain are skewed: the network sees ``log(1 + mm)``, and so do the errors.
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
    """``log(1 + mm)`` of each day, and the days."""
    rows = read_rows(path)
    days = [date(*(int(part) for part in row["date"].split("/"))) for row in rows]
    return torch.tensor([math.log1p(float(row["precipitation"])) for row in rows]), days


def cut_windows(rain: Tensor) -> Tensor:
    """Seven weeks from each day on, (WEEKS + 1, windows, 1, 1, 7): the last week is to be predicted."""
    return rain.unfold(0, 7 * (WEEKS + 1), 1).unflatten(1, (WEEKS + 1, 7)).transpose(0, 1)[:, :, None, None]


# %%
# A ConvLSTM whose kernel sees the neighbouring days, and a 1×1 convolution that reads the week off its state.
class NextWeek(nn.Module):
    """The week that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.read = ConvLSTM(1, 6, kernel_size=3), nn.Conv2d(6, 1, 1)

    def forward(self, film: Tensor) -> Tensor:
        """Weeks (T, N, 1, 1, 7) to the next one."""
        return self.read(self.memory(film)[1][0])


def train(salps: int, film: Tensor) -> nn.Module:
    """A network trained by SGD (one salp), or by a chain of salps around its steps."""
    torch.manual_seed(0)
    model = NextWeek()
    optimizer = SalpSGD(model.parameters(), lr=RATE, total_steps=STEPS, salps=salps, radius=0.01)
    for _ in range(STEPS):
        part = film[:, torch.randint(film.shape[1], (BATCH,))]

        def closure(part: Tensor = part) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(part[:-1]), part[-1])
            loss.backward()
            return loss

        optimizer.step(closure)
    return model


# %%
# The errors on the last year, and one of its winters.
def compare(rain: Tensor, days: list[date]) -> None:
    """Train on all years but the last, and print and draw how far each guess of the last one is off."""
    start = days.index(date(2015, 1, 1))
    film, test = cut_windows(rain[:start]), cut_windows(rain[start:])
    truth = test[-1]
    by_month = [rain[[d.month == m and i < start for i, d in enumerate(days)]].mean() for m in range(1, 13)]
    of_season = torch.stack([by_month[d.month - 1] for d in days[start:]])
    guesses = {
        "no rain": torch.zeros_like(truth),
        "the week before": test[-2],
        "mean of the month": cut_windows(of_season)[-1],
    }
    for name, salps in (("ConvLSTM, SGD", 1), ("ConvLSTM, SalpSGD", 4)):
        model = train(salps, film)
        with torch.no_grad():
            guesses[name] = model(test[:-1])
    for name, guess in guesses.items():
        print(f"{name:18} mean squared error {mse_loss(guess, truth):.3f}")
    plt.figure(figsize=(8, 3.2), layout="constrained")
    plt.plot(truth[::7].flatten()[:120], "k", linewidth=0.7, label="measured")
    for name in ("mean of the month", "ConvLSTM, SGD", "ConvLSTM, SalpSGD"):
        plt.plot(guesses[name][::7].flatten()[:120], linewidth=1, label=name)
    plt.xlabel("days from 12 February 2015")
    plt.ylabel("log(1 + mm)")
    plt.legend()


# %%
# All of it, where the package is.
package = importlib.util.find_spec("vega_datasets")
if package is None or package.origin is None:
    print("Skipped: the series is in the package vega_datasets (pip install vega_datasets).")
else:
    compare(*read_rain(Path(package.origin).parent / "_data" / "seattle-weather.csv"))
    plt.show()
