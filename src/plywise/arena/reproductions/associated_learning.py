"""Associated Learning: the MLP on MNIST, the CNN and VGG on CIFAR-10."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from plywise.arena.method import EndToEnd, Trainer
from plywise.arena.methods.learners import LocalTraining
from plywise.arena.reproductions.experiment import (
    FULL,
    MIDDLE,
    SMALL,
    TEST_ACCURACY,
    Arm,
    Claim,
    Experiment,
    ExperimentSize,
    Paper,
    Start,
)
from plywise.arena.reproductions.sources import cifar_centred, mnist_centred
from plywise.arena.task import CLASSIFICATION
from plywise.local.associated_learning import (
    AssociatedLearning,
    MakeEncoder,
    apart_encoder,
    paper_encoder,
)
from plywise.local.associated_networks import cnn_blocks, he_normal_, mlp_blocks, vgg_blocks
from plywise.local.blocks import Blocks

Modules = list[nn.Module]
MakeBody = Callable[[tuple[int, ...]], Modules]

AL, APART, FROZEN = "Associated Learning", "with encoders begun apart", "with f frozen"


# ---- the networks ----------------------------------------------------------------------------------


def mlp_body(widths: tuple[int, ...]) -> Modules:
    """Two layers on images of MNIST; widths are (n,)."""
    return mlp_blocks(784, widths[0])


def cnn_body(widths: tuple[int, ...]) -> Modules:
    """Eight convolutions in four blocks; widths are (filters, n)."""
    return cnn_blocks(3, widths[0])


def vgg_body(widths: tuple[int, ...], norm: bool = False) -> Modules:
    """Return the paper's VGG in four blocks; widths are (channels of the first convolution, n)."""
    return vgg_blocks(3, widths[0], norm=norm)


def baseline(body: Modules, norm: bool, code: int, example: Tensor) -> nn.Sequential:
    """The layers of Associated Learning's path of inference, for backpropagation: ReLU, scores at the end."""

    def dense(before: int, after: int) -> Modules:
        norms = [nn.BatchNorm1d(after, eps=1e-3, momentum=0.01)] if norm else []  # TensorFlow's defaults
        return [nn.Linear(before, after), *norms, nn.ReLU()]

    for block in body:
        for name, module in [*block.named_children()]:
            if isinstance(module, nn.ELU):
                block.register_module(name, nn.ReLU())
    features = Blocks(body, example).shapes[-1].numel()
    folded = [layer for _ in body[1:] for layer in dense(code, code)]
    bridge = (nn.Flatten(), *dense(features, 5 * code), *dense(5 * code, code))
    return he_normal_(nn.Sequential(*body, *bridge, *folded, nn.Linear(code, 10)))


# ---- training --------------------------------------------------------------------------------------


def schedule(steps: int) -> Callable[[Optimizer], LambdaLR]:
    """Return a tenth of the rate after 40, 60 and 80 % of the steps each, half of it after 90 %."""

    def factor(step: int) -> float:
        done = step / steps
        return float(0.1 ** sum(done >= part for part in (0.4, 0.6, 0.8)) * (0.5 if done >= 0.9 else 1.0))

    return lambda optimizer: LambdaLR(optimizer, factor)


def tensorflow_adam(groups: object, rate: float, decay: float = 0.0) -> Adam:
    """Adam as TensorFlow 1 has it: ε is added before the correction of the second moment, not after.

    Args:
        groups: parameters or parameter groups.
        rate: the rate.
        decay: weight decay of convolutions' weights.
    """
    optimizer = Adam(groups, lr=rate)  # type: ignore[arg-type]
    for group in [*optimizer.param_groups]:
        kernels = [p for p in group["params"] if p.dim() == 4]
        if decay and kernels:
            group["params"] = [p for p in group["params"] if p.dim() != 4]
            optimizer.add_param_group({**group, "params": kernels, "weight_decay": decay})
    count = 0

    def set_eps(*_: object) -> None:
        nonlocal count
        count += 1
        for group in optimizer.param_groups:
            group["eps"] = 1e-8 / (1 - group["betas"][1] ** count) ** 0.5

    optimizer.register_step_pre_hook(set_eps)
    return optimizer


@dataclass
class Augmented:
    """A trainer on images that are shifted, mirrored and standardised one by one; tests standardise only."""

    trainer: Trainer
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.trainer.plain

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch."""
        return self.trainer.step(standardised(shifted(x)), y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the network's outputs."""
        return self.trainer.predict(standardised(x))


def standardised(x: Tensor) -> Tensor:
    """Each image (C, H, W) less its mean, over its deviation."""
    flat = x.flatten(1)
    deviation = flat.std(1, correction=0).clamp_min(flat.shape[1] ** -0.5)
    return ((flat - flat.mean(1, keepdim=True)) / deviation[:, None]).view_as(x)


def shifted(x: Tensor, pad: int = 4) -> Tensor:
    """Each image cut out of its padded self at random, and mirrored or not."""
    count, height, width = len(x), x.shape[2], x.shape[3]
    down, right = torch.randint(2 * pad + 1, (2, count, 1))
    rows = (down + torch.arange(height))[:, :, None]
    across = torch.arange(width).expand(count, width)
    columns = (right + torch.where(torch.rand(count, 1) < 0.5, across, width - 1 - across))[:, None, :]
    padded = F.pad(x, (pad, pad, pad, pad))
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


def associated(body: MakeBody, encoder: MakeEncoder, start: Start) -> LocalTraining:
    """Associated Learning with the paper's bridges; its last width is the codes'."""
    modules = [he_normal_(block).to(start.device) for block in body(start.size.widths)]
    learner = AssociatedLearning(
        Blocks(modules, start.example.to(start.device)),
        10,
        code=start.size.widths[-1],
        encoder=encoder,
        optimizer=lambda groups: tensorflow_adam(groups, start.rate),
        scheduler=schedule(start.size.steps),
    )
    return LocalTraining(learner, plain=False)


def frozen(body: MakeBody, encoder: MakeEncoder, start: Start) -> LocalTraining:
    """Return the control: all forward maps f stay as they begin."""
    local = associated(body, encoder, start)
    for trainer in local.learner.trainers:
        block = trainer.component.get_submodule("block")
        block.requires_grad_(False)
    return local


def backprop(body: MakeBody, norm: bool, decay: float, start: Start) -> EndToEnd:
    """Backpropagation through the same layers."""
    size = start.size
    model = baseline(body(size.widths), norm, size.widths[-1], start.example).to(start.device)
    optimizer = tensorflow_adam(model.parameters(), start.rate, decay)
    return EndToEnd(model, optimizer, CLASSIFICATION.loss, schedule(size.steps)(optimizer))


def augmented(begin: Callable[[Start], Trainer], start: Start) -> Augmented:
    """Training on augmented images."""
    return Augmented(begin(start))


# ---- the experiments -------------------------------------------------------------------------------


def _make_arms(
    body: MakeBody, numbers: tuple[float | None, float | None], bp: Callable[[Start], Trainer] | None = None
) -> tuple[Arm, ...]:
    """Backpropagation, by default through the same body without norm or decay, and Associated Learning."""
    rate = (1e-4,)
    return (
        Arm("BackProp", bp or partial(backprop, body, False, 0.0), rate, numbers[0]),
        Arm(AL, partial(associated, body, paper_encoder), rate, numbers[1]),
        Arm(AL, partial(associated, body, apart_encoder), rate, at=APART),
        Arm(AL, partial(frozen, body, paper_encoder), rate, at=FROZEN),
    )


DIFFERENCES = (
    "The authors' framework is TensorFlow 1. Its Adam, rates, schedule, initialisation and bridges are "
    "followed; it does not shuffle, and we do.",
    "5,000 training images are held out for validation; the authors hold out none.",
    "Its seeds are not published.",
    f"'{APART}' is a variant of ours and '{FROZEN}' a control of ours; the paper has neither.",
)
LOGS = (
    "The numbers are of the authors' logs of a later thesis, not of the paper: other augmentation (two "
    "views), batches of 128, a bridge of 2500 units to 500, a schedule driven by the test accuracy, batch "
    "norm in the VGG of both methods, 300 epochs and one run for BackProp.",
    "Contrast is not changed at random as in the authors' code; brightness neither, since standardisation "
    "cancels it there.",
)
VGG_BASELINE = partial(backprop, partial(vgg_body, norm=True), True, 5e-4)


FROM_LOGS = "the paper's tables could not be read; numbers of the authors' later logs (see the differences)"


def _make_cifar_sizes(
    full: tuple[str, tuple[int, int]], cut: tuple[str, tuple[int, int]]
) -> dict[str, ExperimentSize]:
    """Return the sizes at which a network runs; full and small network, in words and as widths."""
    full_size = ExperimentSize(
        about=f"{full[0]}, batches of 32, 200 epochs, as in the code",
        source=cifar_centred,
        widths=full[1],
        batch=32,
        epochs=200,
        images=45_000,
    )
    images = f"{cut[0]}, n = 64, 6,000 training images (500 for validation, 2,000 for the test)"
    small_size = replace(  # two cores can run it
        full_size,
        about=f"{images}, 8 epochs: 1,496 steps where full size takes 281,200; ten times its rates",
        widths=cut[1],
        epochs=8,
        images=6_000,
        validation=500,
        test=2_000,
        faster=10.0,
    )
    middle_size = replace(
        small_size,
        about=f"{images}, 50 epochs: 9,350 steps where full size takes 281,200; ten times its rates",
        epochs=50,
    )
    return {FULL: full_size, MIDDLE: middle_size, SMALL: small_size}


def _make_cifar_experiment(
    network: str,
    about: str,
    arms: tuple[Arm, ...],
    sizes: tuple[tuple[str, tuple[int, int]], tuple[str, tuple[int, int]]],
    *more: str,
) -> Experiment:
    """Return an experiment on augmented images of CIFAR-10.

    Args:
        network: what it is called.
        about: it, in one line.
        arms: what is compared.
        sizes: full and small network, in words and as widths.
        *more: further reasons why our numbers may differ.
    """
    return Experiment(
        name=f"cifar10-{network}",
        about=about,
        where=FROM_LOGS,
        measure=TEST_ACCURACY,
        arms=tuple(
            replace(arm, begin=partial(augmented, arm.begin), sizes=(FULL, MIDDLE, SMALL)) for arm in arms
        ),
        sizes=_make_cifar_sizes(*sizes),
        claims=(Claim(AL, "BackProp"),),
        differences=(*DIFFERENCES, *LOGS, *more),
    )


PAPER = Paper(
    "associated-learning",
    "Kao, Chen, Associated Learning, Neural Computation 33(1), 2021, arXiv 1906.05560",
    (
        Experiment(
            name="mnist-mlp",
            about="MLP on MNIST: about as accurate as backpropagation through the same layers",
            where="the abstract; the paper's table could not be read",
            measure=TEST_ACCURACY,
            arms=_make_arms(mlp_body, (None, None)),
            sizes={
                FULL: ExperimentSize(
                    about=(
                        "784-1024-1024(-5120-1024)-1024-10, n = 1024, batches of 32, 200 epochs, as in the "
                        "code"
                    ),
                    source=mnist_centred,
                    widths=(1024,),
                    batch=32,
                    epochs=200,
                    images=55_000,
                ),
                SMALL: ExperimentSize(  # shorter runs end while the codes still form, where all is chance
                    about=(
                        "n = 128 in place of 1024 (784-128-128(-640-128)-128-10), 4,000 training images "
                        "(1,000 for validation, 2,000 for the test), 12 epochs: 1,500 steps where full size "
                        "takes 343,600; ten times its rates"
                    ),
                    source=mnist_centred,
                    widths=(128,),
                    batch=32,
                    epochs=12,
                    images=4_000,
                    validation=1_000,
                    test=2_000,
                    faster=10.0,
                ),
            },
            claims=(Claim(AL, "BackProp", within=1.0),),
            differences=(
                *DIFFERENCES,
                "'About as accurate' is the abstract's; 1 point is our reading of it.",
            ),
        ),
        _make_cifar_experiment(
            "cnn",
            "CNN of eight convolutions on CIFAR-10",
            _make_arms(cnn_body, (83.45, 86.30)),
            (
                ("32-32-32-32-64-64-64-64 channels, n = 256", (32, 256)),
                ("a quarter of the channels", (8, 64)),
            ),
        ),
        _make_cifar_experiment(
            "vgg",
            "VGG on CIFAR-10",
            _make_arms(vgg_body, (91.59, 92.75), VGG_BASELINE)[:3],
            (
                ("six convolutions of 128 to 512 channels, two layers of 1024, n = 300", (128, 300)),
                ("a sixteenth of the channels", (8, 64)),
            ),
            "Where batch norm stands among the baseline's last layers is our reading (behind each); weight "
            "decay is 5e-4 on its convolutions, and the 1e-5 on those of Associated Learning is left out.",
        ),
    ),
)
