"""Test ideas from the literature against AdamW in coordinates: which of them helps beyond noise?

    python benchmarks/tried_ideas.py    # writes tried_ideas.json in twenty minutes on one core; resumes

The data sets and the table are those of recommended_defaults.py, which none of our benches uses. Each arm
tunes its rate (three values, by the lowest validation loss) and runs three fresh seeds.

- AdamW in coordinates: the first method of `plywise.recommend`. The other seeds are the null control.
- averaged weights: predictions use an exponential mean of the weights (decay 0.95).
- fixed norms: hidden matrices keep their Frobenius norm, instead of weight decay (Hyperball).
- rank one: only the leading direction of the inputs is whitened (like Eva's mean activation).
- Muon; whitened Muon (`plywise.Coordinates` on it); and Muon with a triangular solve instead of the iteration
  (MUD: rows are normalised, solved with the lower triangle of their Gram matrix, and normalised again).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import plywise as pw
from plywise.arena.method import EndToEnd, Method, Trainer, TrialContext, end_to_end, make_cosine
from plywise.arena.methods.peers import group_hidden, hidden_weights
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.run.ledger import Ledger
from plywise.arena.scoring.records import FINAL, TUNED, TrialRecord
from plywise.optim.stacked import Stack
from recommended_defaults import WORKLOADS, Row, report, summarise
from tuning import HERE

OUT = HERE / "tried_ideas.json"
BASE = "AdamW in coordinates"
RATES = {BASE: (0.0075, 0.015, 0.03), "Muon": (0.005, 0.015, 0.045)}
SEEDS = 3


class TriangularMuon(pw.optim.Muon):
    """Muon with MUD's step: ``Q = normalise(M)``, ``normalise(tril(QQᵀ)⁻¹ Q)``, normalised by rows."""

    def _orthogonalize(self, group: dict[str, object], stack: Stack, gradient: Tensor) -> Tensor:
        momentum, buffer = float(group["momentum"]), stack.state["momentum_buffer"]  # type: ignore[arg-type]
        buffer.lerp_(gradient, 1 - momentum)
        matrices = torch.lerp(gradient, buffer, momentum).flatten(2)
        tall = matrices.shape[1] > matrices.shape[2]
        rows = nn.functional.normalize(matrices.mT if tall else matrices, dim=2)
        lower = (rows @ rows.mT).tril()
        lower.diagonal(dim1=1, dim2=2).clamp_(min=1.0)  # a row of zeros
        solved = torch.linalg.solve_triangular(lower, rows, upper=False)
        found = nn.functional.normalize(solved, dim=2)
        return found.mT if tall else found


@dataclass
class AveragedTraining(EndToEnd):
    """Training that predicts with an exponential mean of the weights."""

    def __post_init__(self) -> None:
        self.mean = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)

    def descend(self, loss: Tensor) -> float:
        """Take a step, then update the mean."""
        value = super().descend(loss)
        self.mean.update_parameters(self.model)
        return value

    def predict(self, x: Tensor) -> Tensor:
        """Return the outputs of the averaged model in eval mode."""
        self.mean.eval()
        with torch.no_grad():
            return self.mean(x)


def make_optimizer(context: TrialContext, weight_decay: float = 0.01) -> Optimizer:
    """Make AdamW at the trial's rate, under `plywise.Coordinates`."""
    optimizer = make_adamw(context, weight_decay)
    pw.Coordinates(damping=0.3).attach(context.model, optimizer, on_nonfinite="propagate")
    return optimizer


def make_adamw(context: TrialContext, weight_decay: float = 0.01) -> Optimizer:
    """Make AdamW at the trial's rate."""
    rate, parameters = context.numbers["rate"], context.model.parameters()
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def train_averaged(context: TrialContext) -> Trainer:
    """Train with averaged weights."""
    optimizer = make_optimizer(context)
    return AveragedTraining(
        context.model, optimizer, context.task.loss, make_cosine(context.steps)(optimizer)
    )


def train_with_fixed_norms(context: TrialContext) -> Trainer:
    """Restore the initial norm of each hidden matrix after each step."""
    optimizer = make_optimizer(context, weight_decay=0.0)
    norms = {weight: weight.detach().norm() for weight in hidden_weights(context)}

    @torch.no_grad()
    def restore(*_: object) -> None:
        for weight, norm in norms.items():
            weight.mul_(norm / weight.norm())

    optimizer.register_step_post_hook(restore)
    return end_to_end(context, optimizer)


def train_with_rank_one(context: TrialContext) -> Trainer:
    """Whiten only one direction."""
    return end_to_end(context, make_adamw(context), pw.Coordinates(rank=1))


def train_by_muon(
    muon: type[pw.optim.Muon], rule: pw.Rule | None = None
) -> Callable[[TrialContext], Trainer]:
    """Return a trainer: Muon for hidden matrices and AdamW for the others, with a rule or without."""

    def begin(context: TrialContext) -> Trainer:
        rate = context.numbers["rate"]
        return end_to_end(
            context,
            muon(group_hidden(context), rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            rule,
        )

    return begin


def make_arm(name: str, kind: str, begin: Callable[[TrialContext], Trainer]) -> Method:
    """Make an arm whose rate is tuned."""
    return Method(name, "", {}, begin, grid=tuple({"rate": rate} for rate in RATES[kind]))


def train_base(context: TrialContext) -> Trainer:
    """Train with AdamW in coordinates."""
    return end_to_end(context, make_optimizer(context))


ARMS = [
    make_arm(BASE, BASE, train_base),
    replace(make_arm(f"{BASE}, other seeds", BASE, train_base), null=BASE),
    make_arm("averaged weights", BASE, train_averaged),
    make_arm("fixed norms", BASE, train_with_fixed_norms),
    make_arm("rank one", BASE, train_with_rank_one),
    make_arm("Muon", "Muon", train_by_muon(pw.optim.Muon)),
    make_arm("whitened Muon", "Muon", train_by_muon(pw.optim.Muon, pw.Coordinates())),
    make_arm("triangular Muon", "Muon", train_by_muon(TriangularMuon)),
]


def choose_lowest(lines: Sequence[TrialRecord], _: float | None) -> TrialRecord | None:
    """Choose the rate with the lowest validation loss."""
    finished = [line for line in lines if line["failure"] is None]
    return min(finished, key=lambda line: min(line["validation"]), default=None)


def main() -> None:
    """Run the missing trials, then print and write the table."""
    torch.set_num_threads(1)
    ledger = Ledger(HERE.parent / "runs" / "tried_ideas.jsonl")
    design = Design(SEEDS, tracks=(TUNED,), choose=choose_lowest)
    table: dict[str, Row] = {arm.name: {} for arm in ARMS}
    for workload in WORKLOADS:
        found = run_arms(workload, ARMS, design, ledger)
        for arm in ARMS:
            lines = [line for line in found.lines(workload.name, arm.name) if line["purpose"] == FINAL]
            table[arm.name][workload.name] = summarise(lines)
    report(table, BASE, OUT)


if __name__ == "__main__":
    main()
