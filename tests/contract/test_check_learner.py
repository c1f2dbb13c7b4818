"""`check_learner` on learners that break a promise each: the error says the promise, and what they did."""

import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.local.learner import check_classes
from plywise.testing import check_learner


class Readout(pw.Component):
    """A block whose output is read by a fixed matrix."""

    def __init__(self, block: nn.Module, readout: Tensor, following: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.following = (following,)  # in a tuple: no submodule
        self.register_buffer("readout", readout)

    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        s = self.block(signal.s)
        return pw.Signal(s, signal.y), cross_entropy(s @ self.readout, signal.y)


class Keeping(pw.OneWayLearner):
    """Keeps every promise: the ones below change a method of it, or of its components."""

    component: ClassVar[type[Readout]] = Readout

    def __init__(self, blocks: pw.Blocks, num_classes: int, *, seed: int = 0, **training: Any) -> None:
        self.blocks, self.classes = blocks, num_classes
        generator = torch.Generator().manual_seed(seed)
        widths = [shape.numel() for shape in blocks.shapes[1:]]
        matrices = [torch.randn(width, num_classes, generator=generator) for width in widths[:-1]]
        readouts = [*(matrix / len(matrix) ** 0.5 for matrix in matrices), torch.eye(num_classes)]
        parts = zip(blocks, readouts, [*blocks[1:], None], strict=True)
        super().__init__([self.component(*part) for part in parts], seed=seed, **training)

    def signal(self, x: Any, y: Tensor) -> pw.Signal:
        check_classes(y, self.classes)
        return pw.Signal(x, y)

    def as_module(self) -> nn.Module:
        return nn.Sequential(*self.blocks)


class KeepsOutput(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        self.last, loss = super().forward(signal)
        return self.last, loss


class KeepsOutputs(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        after, loss = super().forward(signal)
        self.__dict__.setdefault("seen", []).append(after.s.detach().clone())
        return after, loss


class DrawsElsewhere(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        after, loss = super().forward(signal)
        return after, loss * (1 + random.random())


class SeedsAgain(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        torch.manual_seed(0)
        return super().forward(signal)


class RemembersElsewhere(Readout):
    mean = 1.0

    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        after, loss = super().forward(signal)
        self.mean = (self.mean + loss.item()) / 2
        return after, loss / self.mean


class StaysInEvalMode(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        after = super().forward(signal)
        self.block.eval()
        return after


class ChangesItsInput(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        signal.s.data.mul_(0.5)
        return super().forward(signal)


class TrainsTheNext(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        after, loss = super().forward(signal)
        (following,) = self.following
        return after, loss if following is None else loss + following(after.s).square().mean()


class OwnsTheNext(Readout):
    def parameter_groups(self) -> list[dict[str, Any]]:
        modules = [self.block, *(part for part in self.following if part is not None)]
        return [{"params": [p for part in modules for p in part.parameters()]}]


class LearnsNothing(Readout):
    def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
        after, loss = super().forward(signal)
        return after, 0 * loss


def returns(change: Callable[[pw.Signal, Tensor], Any]) -> type[Readout]:
    """Make a component that returns something else of the next signal and the loss."""

    class Returns(Readout):
        def forward(self, signal: pw.Signal) -> tuple[pw.Signal, Tensor]:
            after, loss = super().forward(signal)
            result: tuple[pw.Signal, Tensor] = change(after, loss)
            return result

    return Returns


class EndToEnd(Keeping):
    """Runs one backward for all blocks."""

    def learn_stage(self, first: int, stop: int, signal: pw.Signal, neighbours: Any) -> list[Tensor]:
        losses = []
        for trainer in self.trainers:
            with trainer.randomness(self.steps):
                signal, loss = trainer.component(signal)
            losses.append(loss)
        torch.stack(losses).sum().backward()
        for trainer in self.trainers:
            trainer.apply()
        return [loss.detach() for loss in losses]


class LosesTheSeed(Keeping):
    def __init__(self, blocks: pw.Blocks, num_classes: int, *, seed: int = 0, **training: Any) -> None:
        super().__init__(blocks, num_classes, **training)


class LeavesEvalMode(Keeping):
    def predict(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scores: Tensor = self.as_module().eval()(x)
        return scores


def of(kind: type[Readout]) -> type[Keeping]:
    """Make a learner of such components."""
    return type(kind.__name__, (Keeping,), {"component": kind})


BROKEN = {
    "keeps output": (of(KeepsOutput), r"After a step no activations .* 6 tensors .* are still kept"),
    "keeps outputs": (of(KeepsOutputs), r"must not take more and more memory\. .* adds tensors that stay, 3"),
    "draws elsewhere": (of(DrawsElsewhere), r"The same seed must give the same numbers.*tensors differ"),
    "seeds again": (of(SeedsAgain), r"must depend on the seed and on the step\. With another step"),
    "loses the seed": (LosesTheSeed, r"must depend on the seed and on the step\. With another seed"),
    "remembers elsewhere": (of(RemembersElsewhere), r"must go on bit for bit\. After three resumes"),
    "stays in eval mode": (of(StaysInEvalMode), r"be in training mode.*left block of component 0"),
    "leaves eval mode": (LeavesEvalMode, r"Prediction must change nothing.*another mode \(train or eval\)"),
    "changes its input": (of(ChangesItsInput), r"batch must not be changed\. .* first 'x'"),
    "trains the next": (of(TrainsTheNext), r"Component 0 left a gradient in block\.0\.weight of component 1"),
    "owns the next": (
        of(OwnsTheNext),
        r"trained by one component alone\. The optimizers of the components 0",
    ),
    "learns nothing": (of(LearnsNothing), r"must classify.*never changed: 0: block\.0\.weight"),
    "end to end": (EndToEnd, r"must not depend on the components after it.*Detach what one hands on"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_promise_is_named_with_what_the_learner_did(what: str) -> None:
    kind, words = BROKEN[what]
    with pytest.raises(pw.ContractError, match=words):
        check_learner(kind)


def test_what_keeps_every_promise_passes() -> None:
    before = torch.get_rng_state()
    assert not check_learner(Keeping).skipped
    assert torch.equal(torch.get_rng_state(), before)


def fewer(s: pw.Signal, loss: Tensor) -> tuple[pw.Signal, Tensor]:
    return pw.Signal(s.s[:, 1:], s.y), loss


UNFIT: dict[str, tuple[Any, str]] = {
    "no loss": (of(returns(lambda s, loss: (s, None))), r"Component 0 .* a loss of type NoneType: forward"),
    "no signal": (of(returns(lambda s, loss: loss)), r"Component 0 .* returned Tensor: forward"),
    "a tensor as signal": (of(returns(lambda s, loss: (s.s, loss))), "returned Tensor, Tensor: forward"),
    "a loss without a graph": (
        of(returns(lambda s, loss: (s, loss.detach()))),
        "The loss of component 0 does not depend on its parameters",
    ),
    "a loss a sample": (of(returns(lambda s, loss: (s, s.s.sum(1)))), r"shape \(8,\): .*take its mean"),
    "fewer outputs": (
        of(returns(fewer)),
        r"The first step .* raised BlockError in test_check_learner\.py, line \d+: "
        r"Component 1 \(Sequential\) fails on a batch of \(8, 9\), torch\.float32: ",
    ),
    "no learner": (lambda blocks, classes, **training: nn.Linear(2, 2), "must return a plywise.Learner"),
    "no such argument": (lambda blocks: None, r"unexpected keyword argument.*takes these arguments"),
    "no component": (
        type("Empty", (Keeping,), {"component": lambda *_: nn.Linear(2, 2)}),
        "is a Linear, and",
    ),
    "no module": (type("Bare", (Keeping,), {"as_module": lambda self: print}), "must return the network"),
}


@pytest.mark.parametrize("what", list(UNFIT))
def test_what_cannot_take_a_step_is_refused_in_a_sentence(what: str) -> None:
    kind, words = UNFIT[what]
    with pytest.raises(pw.PlywiseError, match=words) as caught:
        check_learner(kind)
    assert "\n" not in str(caught.value)
