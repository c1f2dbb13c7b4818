"""Wrong arguments that are easily given: each is refused with a sentence that says what to give."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plywise as pw
from plywise.errors import DataError
from plywise.local.forward_forward import write_label
from plywise.registry.names import LEARNER, NAMES

LEARNERS = [entry.name for entry in NAMES if entry.kind == LEARNER]
COUNTED = ("AssociatedLearning", "MonoForward", "CascadedForward")


def make_modules():
    return [nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)]


def make(name="LocalLoss", blocks=None, **settings):
    kind = getattr(pw, name)
    count = {} if name in ("DirectFeedback", "ActivationRelaxation") else {"num_classes": 3}
    optimizer = {"optimizer": torch.optim.Adam}
    given = pw.Blocks(make_modules(), torch.randn(4, 8)) if blocks is None else blocks
    return kind(given, **(count | optimizer | settings))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_list_or_a_model_in_place_of_blocks(name):
    with pytest.raises(pw.BlockError, match=rf"{name} takes plywise\.Blocks; an object of type list"):
        make(name, make_modules())
    with pytest.raises(pw.BlockError, match=r"type Sequential was given. Cut a model by plywise\.split"):
        make(name, nn.Sequential(*make_modules()))


@pytest.mark.parametrize("given", [(torch.randn(4, 8), []), (nn.Linear(8, 3), torch.randn(4, 8)), (["a"], 1)])
def test_blocks_of_something_else_than_modules(given):
    with pytest.raises(pw.BlockError, match="Blocks takes modules in a row; an object of type"):
        pw.Blocks(*given)


def test_an_optimizer_scheduler_or_rule_in_place_of_a_function_that_makes_one():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for name, given in {"optimizer": optimizer, "scheduler": scheduler, "rule": pw.Foof()}.items():
        kind = type(given).__name__
        with pytest.raises(TypeError, match=f"{name} must be a function .*; an object of type {kind} was"):
            make(**{name: given})


def test_a_function_in_place_of_a_list_of_callbacks():
    for given in (print, 3, "print", [3]):
        with pytest.raises(TypeError, match="LocalLoss: callbacks must be a list"):
            make(callbacks=given)


def test_a_function_that_makes_no_optimizer():
    with pytest.raises(
        TypeError, match=r"must return a torch\.optim\.Optimizer, not NoneType \(component 0\)"
    ):
        make(optimizer=lambda groups: None)


def test_split_gets_a_model_and_a_whole_number():
    x = torch.randn(4, 8)
    model = nn.Sequential(*make_modules())
    for given, kind in ((model.parameters(), "generator"), (nn.Linear, "the class Linear"), (2, "int")):
        with pytest.raises(
            pw.BlockError, match=rf"first argument, not {kind}\. Write plywise\.split\(model, 4"
        ):
            pw.split(given, 2, x)
    for k in (2.5, "2", 0, model):
        with pytest.raises(pw.BlockError, match="1 block or more, a whole number, not"):
            pw.split(model, k, x)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("count", [0, 2.5])
def test_a_number_of_classes_that_is_none(name, count):
    with pytest.raises(ValueError, match="num_classes must be a whole number above 0"):
        make(name, num_classes=count)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_number_of_classes_of_numpy(name):
    numpy = pytest.importorskip("numpy")
    count = {} if name in ("DirectFeedback", "ActivationRelaxation") else {"num_classes": numpy.int64(3)}
    shape, y = (4, 8), torch.tensor([0, 1, 2, 0])
    if name == "LocalNextToken":
        shape, y = (4, 5, 8), torch.tensor([[0, 1, 2, 0, 1]] * 4)
    x = torch.randn(shape)
    assert make(name, pw.Blocks(make_modules(), x), **count).step(x, y).isfinite().all()


def test_widths_and_numbers_of_bridges():
    make_learner = functools.partial(make, "AssociatedLearning")
    with pytest.raises(ValueError, match="code must be a whole number above 0"):
        make_learner(code=16.0)
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"a list of {count} for 2 blocks"):
            make_learner(bridge=[pw.local.associated_learning.wide_bridge] * count)
    with pytest.raises(ValueError, match="skip must be a whole number"):
        make("ForwardForward", skip=0.5)


def test_another_number_of_classes_than_the_last_block_has_scores():
    with pytest.raises(pw.BlockError, match="or correct the number of classes"):
        make(num_classes=4)


def test_a_label_that_does_not_fit_into_an_input():
    assert write_label(torch.ones(2, 3), torch.tensor([0, 2]), 3).tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(pw.PlywiseError, match="4 classes does not fit into inputs of 3 numbers"):
        write_label(torch.ones(2, 3), torch.tensor([0, 2]), 4)


# ---- losses, targets and batches that do not fit


def make_learner_by_loss(name, loss, modules=None, classes=3):
    x = torch.randn(8, 8)
    blocks = pw.Blocks(make_modules() if modules is None else modules, x)
    count = {} if name in ("DirectFeedback", "ActivationRelaxation") else {"num_classes": classes}
    return make(name, blocks, loss=loss, **count), x


TAKE_A_LOSS = [
    "AssociatedLearning",
    "LocalLoss",
    "Interlocking",
    "LocalForwardGradient",
    "ActivationRelaxation",
    "DirectFeedback",
    "MomentumAuxiliary",
]
LOSSES = {
    "of each sample": (
        functools.partial(F.cross_entropy, reduction="none"),
        r"of shape \(8,\). Take",
    ),
    "no tensor": (lambda scores, y: F.cross_entropy(scores, y).detach().item(), "one number in a tensor"),
    "without a graph": (lambda scores, y: F.cross_entropy(scores.detach(), y), "nothing would be learned"),
}


@pytest.mark.parametrize("name", TAKE_A_LOSS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_backward_cannot_begin_with(name, kind):
    loss, words = LOSSES[kind]
    learner, x = make_learner_by_loss(name, loss)
    with pytest.raises(pw.PlywiseError, match=words):
        learner.step(x, torch.arange(8) % 3)


@pytest.mark.parametrize("name", TAKE_A_LOSS)
def test_a_loss_of_another_kind(name):
    with pytest.raises(TypeError, match=f"{name}: loss must be a function .* of type str was given"):
        make_learner_by_loss(name, "mse_loss")
    with pytest.raises(TypeError, match="has parameters, and all components would train them at once"):
        make_learner_by_loss(name, nn.Bilinear(3, 3, 1))


@pytest.mark.parametrize("name", ["LocalLoss", "Interlocking", "LocalForwardGradient", "MomentumAuxiliary"])
def test_the_cross_entropy_of_one_score(name):
    modules = [nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 1)]
    with pytest.raises(pw.BlockError, match=r"of a single score is 0 .* give a loss, such as"):
        make_learner_by_loss(name, F.cross_entropy, modules, classes=1)


class Number(nn.Module):
    """One number a sample, (N,)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 1)

    def forward(self, x):
        return self.linear(x).squeeze(1)


@pytest.mark.parametrize("name", TAKE_A_LOSS[1:])
@pytest.mark.filterwarnings("error:Using a target size")  # scores (N, 1) of heads against targets (N,)
def test_a_last_block_that_hands_on_numbers_without_a_dimension(name):
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(8, 16), nn.Tanh()), Number()]
    learner, x = make_learner_by_loss(name, F.mse_loss, modules, classes=1)
    y = x[:, 0] + 1
    losses = torch.stack([learner.step(x, y)[-1] for _ in range(300)])
    assert losses[-50:].mean() < losses[0] / 2
    assert learner.predict(x).shape == (8,)


@pytest.mark.parametrize(
    "name", [name for name in LEARNERS if name not in ("LocalNextToken", "ForwardForward")]
)
def test_a_sample_of_another_shape_than_the_examples_names_the_component(name):
    learner = make(name)
    with pytest.raises(pw.BlockError, match=r"Component 0 \(Sequential\) fails on a batch of \(4, 7\), "):
        learner.step(torch.randn(4, 7), torch.tensor([0, 1, 2, 0]))


class OwnStep(pw.Component):
    """A component without a block, whose step fails."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, signal):
        return signal, {}["loss"]


class OwnSteps(pw.OneWayLearner):
    def as_module(self):
        return nn.Identity()


def test_another_error_keeps_its_class_and_names_the_component():
    learner = OwnSteps([OwnStep()], optimizer=torch.optim.SGD)
    with pytest.raises(KeyError) as caught:
        learner.step(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    said = "Raised by component 0 (OwnStep), which was given a batch of (4, 8), torch.float32."
    assert caught.value.__notes__ == [said]


@pytest.mark.parametrize("name", ["MonoForward", "CascadedForward", "AssociatedLearning", "DirectFeedback"])
def test_an_image_of_another_size_where_a_matrix_has_the_examples(name):
    top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    modules = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), top]
    learner = make(name, pw.Blocks(modules, torch.randn(2, 1, 8, 8)))
    y = torch.tensor([0, 1, 2, 0])
    learner.step(torch.randn(4, 1, 8, 8), y)
    with pytest.raises(pw.BlockError, match="give samples of its shape and dtype, or a head"):
        learner.step(torch.randn(4, 1, 9, 7), y)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "CascadedForward"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_refused(name, mode):
    learner = make(name)
    with mode(), pytest.raises(pw.PlywiseError, match="would learn nothing"):
        learner.step(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))


def test_batches_of_something_else_than_tensors():
    learner, x, y = make(), torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    with pytest.raises(DataError, match="inputs must be tensors; an object of type ndarray"):
        learner.step(x.numpy(), y)
    with pytest.raises(DataError, match="targets must be tensors; an object of type list"):
        learner.step(x, y.tolist())
    with pytest.raises(DataError, match="inputs must be tensors; an object of type ndarray"):
        learner.predict(x.numpy())
    with pytest.raises(DataError, match="this batch has -100 … 2; leave out samples without a class"):
        learner.step(x, torch.tensor([0, 1, 2, -100]))


def test_an_optimizer_that_evaluates_the_loss_itself():
    with pytest.raises(TypeError, match="LBFGS evaluates the loss several times in a step"):
        make(optimizer=torch.optim.LBFGS)


def test_tokens_as_inputs_where_labels_are_written_into_numbers():
    blocks = pw.Blocks(
        [nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))], torch.zeros(2, 5, dtype=torch.long)
    )
    with pytest.raises(DataError, match=r"must be numbers, and these are torch\.int64"):
        make("ForwardForward", blocks).step(torch.ones(4, 5, dtype=torch.long), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("name", ["SCPL", "MomentumAuxiliary", "LocalForwardGradient"])
def test_scores_at_each_position_where_samples_are_classified(name):
    blocks = pw.Blocks([nn.Linear(8, 8), nn.Linear(8, 3)], torch.randn(2, 5, 8))
    with pytest.raises(pw.BlockError, match=f"{name} classifies samples, and .* which learn tokens"):
        make(name, blocks)


@pytest.mark.parametrize("name", ["LocalLoss", "Interlocking"])
def test_one_class_a_sample_where_the_blocks_score_tokens(name):
    x = torch.randn(4, 5, 8)
    learner = make(name, pw.Blocks([nn.Linear(8, 8), nn.Linear(8, 3)], x))
    with pytest.raises(DataError, match=r"must be tokens \(N, T\), not .* hand on 3 scores"):
        learner.step(x, torch.tensor([0, 1, 2, 0]))


class Detached(nn.Module):
    """A block that a gradient does not reach."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x).detach()


@pytest.mark.parametrize("name", ["LocalLoss", "Interlocking", "MonoForward", "SCPL", "DirectFeedback"])
def test_a_block_that_no_gradient_reaches(name):
    learner = make(name, pw.Blocks([nn.Linear(8, 16), Detached(), nn.Linear(16, 3)], torch.randn(4, 8)))
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    with pytest.warns(UserWarning, match=r"the block of component 1 \(Detached\), so that it does not"):
        learner.step(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.step(x, y)  # it is said once


@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
def test_compiled_blocks_where_forward_derivatives_are_needed(how):
    first, last = make_modules()
    if how == "torch.compile":
        first = torch.compile(first, backend="eager")
    else:
        first[0].compile(backend="eager")
    with pytest.raises(pw.BlockError, match=r"Block 0 is compiled, .* as it was before torch"):
        make("LocalForwardGradient", pw.Blocks([first, last], torch.randn(4, 8)))


def test_an_argument_that_a_learner_does_not_have():
    with pytest.raises(TypeError, match=r"Interlocking has no argument 'horizn'\. Did you mean horizon"):
        make("Interlocking", horizn=2)
    with pytest.raises(TypeError, match=r"LocalLoss has no argument 'horizon'\. It has: blocks, num_cl"):
        make("LocalLoss", horizon=2)
