"""
Vapour pressure from the groups of a molecule
=============================================

This example predicts the logarithm of the vapour pressure of a compound from its groups and the temperature.
A group contribution method estimates a property of a molecule from the counts of its groups, such as CH3 or
OH. A small network gets these counts and the temperature, for 100 compounds as in the papers on ANN-GCM; the
last 20 compounds are used for the test only. It is trained with Adam, with Adam and `Foof`, and with SGD and
`ProxProp`, with three seeds each. We compare it with the oldest method, a linear one: each group adds a
constant and a constant over the temperature to ln p. These constants are fitted by ridge regression.

The pressures come from Antoine equations in the package *chemicals* (MIT), which are fits of measurements.
The table of compounds of the papers is not public, so their errors cannot be compared with ours.
"""

# %%
# The groups of a formula (SMILES): each atom with its highest bond order and its number of hydrogens, such as
# C H3 or O=H0.
import hashlib
import re
from collections import Counter

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import plywise as pw
from plywise.data.store import find_file
from plywise.data.tables import read_rows

torch.set_num_threads(1)
VALENCES = {"C": 4, "N": 3, "O": 2, "S": 2, "F": 1, "Cl": 1, "Br": 1, "I": 1}
BONDS = {"-": 1, "=": 2, "#": 3}


def count_groups(smiles: str) -> Counter[str]:
    """Count the groups of a molecule; empty for formulas with charges, isotopes or metals."""
    atoms: list[str] = []
    used: list[int] = []  # bonds of each atom, without hydrogens
    highest: list[int] = []
    open_rings: dict[str, tuple[int, int]] = {}
    branches: list[int] = []
    last, bond = -1, 1
    tokens = re.findall(r"Cl|Br|[CNOSFI]|[-=#()]|\d|.", smiles)

    def connect(one: int, other: int, order: int) -> None:
        for atom in (one, other):
            used[atom] += order
            highest[atom] = max(highest[atom], order)

    for token in tokens:
        if token in VALENCES:
            atoms.append(token)
            used.append(0)
            highest.append(1)
            if last >= 0:
                connect(last, len(atoms) - 1, bond)
            last, bond = len(atoms) - 1, 1
        elif token in BONDS:
            bond = BONDS[token]
        elif token == "(":
            branches.append(last)
        elif token == ")":
            last = branches.pop()
        elif token.isdigit() and token in open_rings:
            other, order = open_rings.pop(token)
            connect(last, other, max(bond, order))
            bond = 1
        elif token.isdigit():
            open_rings[token], bond = (last, bond), 1
        else:
            return Counter()
    signs = " -=#"
    groups = Counter(
        f"{atom}{signs[order]}H{VALENCES[atom] - n}"
        for atom, n, order in zip(atoms, used, highest, strict=True)
        if VALENCES[atom] >= n
    )
    groups["rings"] = smiles.count("1") // 2 + smiles.count("2") // 2
    return groups if sum(groups.values()) - groups["rings"] == len(atoms) else Counter()


# %%
# The data are 100 compounds with four to ten heavy atoms (C, N, O and halogens), chosen by a hash of their
# CAS numbers. Each has eight temperatures in the range of its equation.
POINTS, TEST = 8, 20


def read_compounds(rows: list[dict[str, str]]) -> tuple[Tensor, Tensor, list[str]]:
    """Return inputs (100, POINTS, groups + 1), ln p in pascals (100, POINTS, 1), and names of the inputs."""
    known = [(row, count_groups(row["smiles"])) for row in rows if row["antoine_A"]]
    small = [pair for pair in known if 4 <= sum(pair[1].values()) - pair[1]["rings"] <= 10]
    chosen = sorted(small, key=lambda pair: hashlib.sha256(pair[0]["cas"].encode()).digest())[:100]
    names = sorted({group for _, groups in chosen for group in groups})
    inputs, pressures = [], []
    for row, groups in chosen:
        a, b, c, low, high = (float(row[f"antoine_{part}"]) for part in ("A", "B", "C", "Tmin_K", "Tmax_K"))
        kelvin = torch.linspace(low, high, POINTS)
        counts = torch.tensor([float(groups[name]) for name in names]).expand(POINTS, -1)
        inputs.append(torch.cat([counts, 1000 / kelvin.unsqueeze(1)], 1))
        pressures.append((a - b / (kelvin + c)).unsqueeze(1))
    return torch.stack(inputs), torch.stack(pressures), [*names, "1000/T"]


# %%
# The network has 16 hidden units. Inputs and pressures are standardised by the training compounds. The rates
# are the best of four by training loss after 600 steps: 0.001 to 0.03 with Adam, 0.3 to 10 with ProxProp.
STEPS, BATCH, SEEDS = 400, 64, range(3)
METHODS = {"Adam": (None, 0.01), "Foof on Adam": (pw.Foof, 0.01), "ProxProp on SGD": (pw.ProxProp, 3.0)}


def train(method: str, seed: int, x: Tensor, y: Tensor) -> tuple[nn.Module, list[float]]:
    """The network after all steps, and its loss in each."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 16), nn.Tanh(), nn.Linear(16, 1))
    make_rule, rate = METHODS[method]
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    if make_rule is pw.ProxProp:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    if make_rule is not None:
        make_rule().attach(model, optimizer)
    losses = []
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        loss = mse_loss(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def fit_linearly(inputs: Tensor, pressures: Tensor) -> Tensor:
    """Fit the linear method to the training compounds, and return its predictions for all compounds."""
    counts = torch.cat([inputs[..., :-1], torch.ones_like(inputs[..., :1])], 2).double()
    features = torch.cat([counts, counts * inputs[..., -1:]], 2)
    known, wanted = features[:-TEST].flatten(0, 1), pressures[:-TEST].flatten(0, 1).double()
    gram = known.T @ known + 1.0 * torch.eye(known.shape[1], dtype=torch.float64)
    return (features @ torch.linalg.solve(gram, known.T @ wanted)).float()


def print_errors(name: str, errors: Tensor, loss: float | None = None) -> None:
    """Print the errors of predictions of ln p."""
    trained = "" if loss is None else f"training loss {loss:.4f}; "
    print(
        f"{name}: {trained}20 new compounds: |Δ ln p| {errors.mean():.2f} on average, half of the pressures "
        f"within {100 * torch.expm1(errors.median()):.0f} %"
    )


def compare(inputs: Tensor, pressures: Tensor) -> None:
    """Train each method; print and plot its errors."""
    x_mean, x_scale = inputs[:-TEST].mean((0, 1)), inputs[:-TEST].std((0, 1)).clamp_min(1e-3)
    y_mean, y_scale = pressures[:-TEST].mean(), pressures[:-TEST].std()
    x, y = (inputs - x_mean) / x_scale, (pressures - y_mean) / y_scale
    print_errors("linear", (fit_linearly(inputs, pressures) - pressures)[-TEST:].abs())
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for method in METHODS:
        runs = [train(method, seed, x[:-TEST].flatten(0, 1), y[:-TEST].flatten(0, 1)) for seed in SEEDS]
        with torch.no_grad():
            predicted = torch.stack([model(x[-TEST:]) for model, _ in runs]) * y_scale + y_mean
        losses = torch.tensor([losses for _, losses in runs])
        print_errors(method, (predicted - pressures[-TEST:]).abs(), losses[:, -50:].mean().item())
        left.semilogy(losses.median(0).values.unfold(0, 20, 20).mean(1), label=method)
        right.plot(pressures[-TEST:].flatten(), predicted.mean(0).flatten(), ".", markersize=3, label=method)
    limits = [pressures.min().item(), pressures.max().item()]
    right.plot(limits, limits, "k", linewidth=0.5)
    left.set(xlabel="steps / 20", ylabel="training loss")
    right.set(xlabel="ln (p / Pa)", ylabel="predicted, mean of three seeds", title="new compounds")
    left.legend()


# %%
# Run everything if the table is there.
path = find_file("compounds.csv.gz")
if path is None:
    print(
        "Skipped: the table compounds.csv.gz is in none of plywise's data folders. Its columns are cas, "
        "smiles and antoine_A, _B, _C, _Tmin_K, _Tmax_K, as the package chemicals has them "
        "(chemicals.vapor_pressure.Psat_data_AntoinePoling). Set PLYWISE_DATA to its folder."
    )
else:
    inputs, pressures, names = read_compounds(read_rows(path))
    print(f"{len(names)} inputs: {', '.join(names)}")
    compare(inputs, pressures)
    plt.show()
