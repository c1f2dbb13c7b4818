"""The local learners that ship, as the contract in `plywise.testing` checks them."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import plywise as pw
from plywise.local.linear_heads import GradientHead
from plywise.testing.cases import LearnerCase

CHAIN = "all blocks wait for the error at the output"
FEATURES = "features are made in eval mode: nothing is drawn"


def relaxation(blocks: pw.Blocks, num_classes: int, **training: Any) -> pw.Learner:
    return pw.ActivationRelaxation(blocks, rate=0.5, iterations=20, **training)


def feedback(blocks: pw.Blocks, num_classes: int, **training: Any) -> pw.Learner:
    return pw.DirectFeedback(blocks, **training)


def put_last(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Labels over the last numbers, which hold nothing here."""
    return torch.cat([x[:, :-num_classes], 3.0 * F.one_hot(y, num_classes)], 1)


CASES = [
    LearnerCase("associated", partial(pw.AssociatedLearning, code=12)),
    LearnerCase("local_loss", pw.LocalLoss),
    LearnerCase(
        "interlocking",
        partial(pw.Interlocking, horizon=2),
        keeps_activations="a block receives the loss of the next",
    ),
    LearnerCase(
        "cafo_gradient",
        partial(pw.CascadedForward, head=GradientHead),
        raises=True,
        draws_nothing=FEATURES,
    ),
    LearnerCase(
        "cafo_ridge",
        pw.CascadedForward,
        raises=True,
        optimizes=False,
        draws_nothing=FEATURES,
    ),
    LearnerCase("forward_gradient", pw.LocalForwardGradient),
    LearnerCase(
        "relaxation",
        relaxation,
        takes_any_targets="its loss takes any targets, torch's refuses these itself",
        keeps_activations="it relaxes the activations of all blocks together",
    ),
    LearnerCase("next_token", pw.LocalNextToken),
    LearnerCase("forward_forward", partial(pw.ForwardForward, put=put_last, skip=0)),
    LearnerCase("mono_forward", pw.MonoForward),
    LearnerCase("direct_feedback", feedback, keeps_activations=CHAIN),
    LearnerCase(
        "momentum_auxiliary",
        partial(pw.MomentumAuxiliary, momentum=0.9),
        keeps_activations="a head runs copies of the next block, which keep activations beside the block's",
    ),
    LearnerCase("scpl", pw.SCPL),
]
