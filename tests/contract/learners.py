"""The local learners that ship, as the contract in `plywise.testing` checks them."""

from functools import partial
from typing import Any

import plywise as pw
from plywise.local.linear_heads import GradientHead
from plywise.testing.cases import LearnerCase

FEATURES = "features are made in eval mode: nothing is drawn"


def relaxation(blocks: pw.Blocks, num_classes: int, **training: Any) -> pw.Learner:
    return pw.ActivationRelaxation(blocks, rate=0.5, iterations=20, **training)


CASES = [
    LearnerCase("associated", partial(pw.AssociatedLearning, code=12)),
    LearnerCase("local_loss", pw.LocalLoss),
    LearnerCase(
        "interlocking",
        partial(pw.Interlocking, horizon=2),
        keeps_activations="a block hears of the loss of the next",
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
]
