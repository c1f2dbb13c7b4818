"""
Vapour pressure from the groups of a molecule
=============================================

A group contribution method says what a molecule does by what it is made of: so many CH3, so many OH. Here a
small network gets the counts of the groups and the temperature, and predicts the logarithm of the vapour
pressure, for 100 compounds as in the papers on ANN-GCM. The last 20 compounds are never trained on. It is
trained by Adam, by Adam with `Foof`, and by SGD with `ProxProp`, with three seeds each. The oldest method of
all, a linear one, stands beside them: each group adds a constant and a constant over the temperature to
ln p, found by ridge regression.

The pressures are those of Antoine equations in the package *chemicals* (MIT), fits of measurements. The
papers' own table of compounds is not public, so that their errors cannot be compared with these.
"""

# %%
# A formula (SMILES) as groups: each atom with its highest bond and its hydrogens, such as C H3 or O=H0.
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
    """How often each group is in a molecule; empty for formulas with charges, isotopes or metals."""
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
# 100 compounds with four to ten heavy atoms of C, N, O and halogens, chosen by a hash of their numbers, at
# eight temperatures each in the range of their equation.
POINTS, TEST = 8, 20


def read_compounds(rows: list[dict[str, str]]) -> tuple[Tensor, Tensor, list[str]]:
    """Inputs (100, POINTS, groups + 1), ln p in pascals (100, POINTS, 1), and the names of the inputs."""
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
    """Predictions of the linear method for all compounds, from the training compounds."""
    counts = torch.cat([inputs[..., :-1], torch.ones_like(inputs[..., :1])], 2).double()
    features = torch.cat([counts, counts * inputs[..., -1:]], 2)
    known, wanted = features[:-TEST].flatten(0, 1), pressures[:-TEST].flatten(0, 1).double()
    gram = known.T @ known + 1.0 * torch.eye(known.shape[1], dtype=torch.float64)
    return (features @ torch.linalg.solve(gram, known.T @ wanted)).float()


def say(name: str, off: Tensor, loss: float | None = None) -> None:
    """Print how far predictions of ln p are off."""
    trained = "" if loss is None else f"training loss {loss:.4f}; "
    print(
        f"{name}: {trained}20 new compounds: |Δ ln p| {off.mean():.2f} on average, half of the pressures "
        f"within {100 * torch.expm1(off.median()):.0f} %"
    )


def compare(inputs: Tensor, pressures: Tensor) -> None:
    """Print and draw how far each method comes."""
    x_mean, x_scale = inputs[:-TEST].mean((0, 1)), inputs[:-TEST].std((0, 1)).clamp_min(1e-3)
    y_mean, y_scale = pressures[:-TEST].mean(), pressures[:-TEST].std()
    x, y = (inputs - x_mean) / x_scale, (pressures - y_mean) / y_scale
    say("linear", (fit_linearly(inputs, pressures) - pressures)[-TEST:].abs())
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for method in METHODS:
        runs = [train(method, seed, x[:-TEST].flatten(0, 1), y[:-TEST].flatten(0, 1)) for seed in SEEDS]
        with torch.no_grad():
            predicted = torch.stack([model(x[-TEST:]) for model, _ in runs]) * y_scale + y_mean
        losses = torch.tensor([losses for _, losses in runs])
        say(method, (predicted - pressures[-TEST:]).abs(), losses[:, -50:].mean().item())
        left.semilogy(losses.median(0).values.unfold(0, 20, 20).mean(1), label=method)
        right.plot(pressures[-TEST:].flatten(), predicted.mean(0).flatten(), ".", markersize=3, label=method)
    limits = [pressures.min().item(), pressures.max().item()]
    right.plot(limits, limits, "k", linewidth=0.5)
    left.set(xlabel="steps / 20", ylabel="training loss")
    right.set(xlabel="ln (p / Pa)", ylabel="predicted, mean of three seeds", title="new compounds")
    left.legend()


# %%
# All of it, where the table is.
path = find_file("compounds.csv.gz")
if path is None:
    print(
        "Skipped: the table compounds.csv.gz is in none of plywise's folders for data. It has columns cas, "
        "smiles and antoine_A, _B, _C, _Tmin_K, _Tmax_K, as the package chemicals has them "
        "(chemicals.vapor_pressure.Psat_data_AntoinePoling). PLYWISE_DATA names its folder."
    )
else:
    inputs, pressures, names = read_compounds(read_rows(path))
    print(f"{len(names)} inputs: {', '.join(names)}")
    compare(inputs, pressures)
    plt.show()
