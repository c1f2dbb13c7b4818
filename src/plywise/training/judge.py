"""Tests a learner."""

from plywise.data.batches import Part, count_samples
from plywise.data.training_data import count_right
from plywise.local.learner import Learner
from plywise.local.whole_model import WholeModel

_CHUNK = 1000  # samples that are predicted at a time


def judge(learner: Learner, part: Part, kind: str) -> float:
    """Return a learner's accuracy on a set, its mean squared error for numbers, or its mean metric."""
    total = count = 0.0
    for x, y in part.chunks(_CHUNK):
        if isinstance(learner, WholeModel):
            samples = float(count_samples(x))
            found = learner.measure(x) * samples, samples
        else:
            found = count_right(kind, learner.predict(x), y)
        total, count = total + found[0], count + found[1]
    return total / max(count, 1.0)
