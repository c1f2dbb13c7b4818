"""Ways in which real models use their weights: what is handled, what `explain` says, and what resumes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written_forwards import Forward, Net, draw

import plywise as pw

MEMORY: dict[str, Any] = {"stats_every": 1, "refresh_every": 1}


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


PRODUCTS: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "ellipsis": (lambda s, x: torch.einsum("...d,de->...e", x, s.w), (4, 5, 6)),
    "ellipsis first": (lambda s, x: torch.einsum("ed, ...d -> ...e", s.w, x), (3, 4, 5, 6)),
    "no output named": (lambda s, x: torch.einsum("bd,de", x, s.w), (8, 6)),
    "no output, ellipsis": (lambda s, x: torch.einsum("...d,de", x, s.w), (4, 5, 6)),
    "by name": (lambda s, x: torch.matmul(input=x, other=s.w), (8, 6)),
    "mm by name": (lambda s, x: torch.mm(x, mat2=s.w), (8, 6)),
    "expanded over a batch": (lambda s, x: torch.bmm(x, s.w.expand(len(x), -1, -1)), (4, 5, 6)),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "rule", [pw.ProxProp(), pw.Foof(**MEMORY, sample=1)], ids=lambda rule: type(rule).__name__
)
def test_a_product_is_that_of_a_linear_layer(name: str, rule: pw.Rule) -> None:
    run, shape = PRODUCTS[name]
    x, rule = draw(*shape), copy.copy(rule)
    model, layer = Net(run, w=(6, 6)), nn.Linear(6, 6, bias=False)
    transposed = name == "ellipsis first"
    layer.weight.data.copy_(model.w if transposed else model.w.t())
    other = copy.copy(rule)
    steps = [(model, sgd(model)), (layer, sgd(layer))]
    for (network, optimizer), attached in zip(steps, (rule, other), strict=True):
        attached.attach(network, optimizer)
    for _ in range(3):
        for network, optimizer in steps:
            step(network, optimizer, x)
    assert rule.explain().share == 1
    expected = layer.weight if transposed else layer.weight.t()
    torch.testing.assert_close(model.w, expected, rtol=1e-4, atol=1e-6)


def test_other_expanded_weights_are_left_to_autograd() -> None:
    def run(s: Net, x: Tensor) -> Tensor:
        return torch.einsum("bnd,bde->bne", x, s.w.expand(len(x), -1, -1))

    x, model = draw(4, 5, 6), Net(run, w=(6, 6), l=nn.Linear(6, 6))
    plain = copy.deepcopy(model)
    plain(x).square().mean().backward()
    optimizer = sgd(model)
    rule = pw.Foof(**MEMORY).attach(model, optimizer)
    model(x).square().mean().backward()
    assert torch.equal(model.w.grad, plain.w.grad)
    optimizer.step()
    assert "expanded view" in next(row for row in rule.explain().rows if "w" in row.keys).reason


@pytest.mark.parametrize("shape", [(3, 5), (7, 3, 5), (2, 7, 3, 5)])
def test_an_ellipsis_of_both_operands_names_experts(shape: tuple[int, ...]) -> None:
    named = {2: "ei,eoi->eo", 3: "nei,eoi->neo", 4: "mnei,eoi->mneo"}[len(shape)]
    x, gradients = draw(*shape).double(), []
    for equation in (named, "...i,...oi->...o", "... i, ... o i"):
        torch.manual_seed(0)
        model = Net(lambda s, x, e=equation: torch.einsum(e, x, s.w), w=(3, 4, 5)).double()
        model.w.data.copy_(torch.linspace(-1, 1, 60).view(3, 4, 5))
        rule = pw.ProxProp().attach(model)
        model(x).square().mean().backward()
        assert rule.explain().share == 1
        gradients.append(model.w.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


CONTRACTIONS: dict[str, tuple[Forward, str, tuple[int, ...], tuple[int, ...]]] = {
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, 1), "nti,io->nto", (7, 3, 5), (5, 4)),
    "tensordot of axes": (
        lambda s, x: torch.tensordot(x, s.w, dims=([1, -1], [0, 1])),
        "nti,tio->no",
        (7, 3, 5),
        (3, 5, 4),
    ),
    "tensordot from the left": (
        lambda s, x: torch.tensordot(s.w, x, dims=([1], [1])),
        "oi,ni->on",
        (7, 5),
        (4, 5),
    ),
    "inner": (lambda s, x: torch.inner(x, s.w), "nti,oi->nto", (7, 3, 5), (4, 5)),
    "linalg.matmul": (lambda s, x: torch.linalg.matmul(x, s.w), "ni,io->no", (7, 5), (5, 4)),
    "a stack and a batch": (lambda s, x: x @ s.w, "nbei,eio->nbeo", (7, 2, 3, 1, 5), (3, 5, 4)),
    "a stack from the left": (lambda s, x: s.w @ x[..., None], "nei,eoi->neo", (7, 3, 5), (3, 4, 5)),
    "a stack of one": (lambda s, x: x @ s.w[None, None], "ni,io->no", (7, 1, 1, 5), (5, 4)),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.parametrize(
    "rule", [pw.ProxProp(), pw.BackMatching(mode="exact"), pw.Foof(**MEMORY, sample=1)], ids=str
)
def test_a_contraction_is_an_einsum(name: str, rule: pw.Rule) -> None:
    run, equation, of_x, of_weight = CONTRACTIONS[name]

    def run_einsum(s: Net, x: Tensor) -> Tensor:
        flat = x.reshape([size for size in x.shape if size > 1])
        return torch.einsum(equation, flat, s.w)

    x, found = draw(*of_x).double().requires_grad_(), []
    for forward in (run, run_einsum):
        torch.manual_seed(0)
        model = Net(forward, w=of_weight).double()
        model.w.data.copy_(torch.linspace(-1, 1, model.w.numel()).view(of_weight))
        optimizer = sgd(model)
        attached = copy.copy(rule).attach(model, optimizer)
        for _ in range(3):
            x.grad = None
            step(model, optimizer, x)
        assert attached.explain().share == 1
        found.append((model.w.detach().clone(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_a_contraction_has_torchs_bits(name: str) -> None:
    run, _, of_x, of_weight = CONTRACTIONS[name]
    x, found = draw(*of_x).requires_grad_(), []
    model = Net(run, w=of_weight)
    for attaches in (False, True):
        if attaches:
            pw.Backprop().attach(model)
        x.grad = None
        output = model(x)
        output.sin().square().mean().backward()
        found.append((output.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_what_no_reader_takes_is_computed_by_torch() -> None:
    model = Net(lambda s, x: torch.tensordot(x, s.w, ([1, 0], [1, 0])) + x @ s.v, w=(7, 5), v=(5,))
    rule = pw.ProxProp().attach(model)
    model(draw(7, 5)).sum().backward()
    reasons = {row.keys[0]: row.reason for row in rule.explain().rows if row.keys}
    assert "tensordot, which is not read as a linear map" in reasons["w"]
    assert "matmul" in reasons["v"]
    assert "used by matmul as a vector" in reasons["v"]


@pytest.mark.parametrize("equation", ["bi,oi->bo", "bi,eoi->beo", "...bin,oi->bo", "bi->b"])
def test_a_wrong_einsum_is_refused_in_torchs_words(equation: str) -> None:
    def raise_error() -> str:
        with pytest.raises(RuntimeError) as caught:
            model(draw(2, 7, 5))
        return str(caught.value)

    model = Net(lambda s, x: torch.einsum(equation, x, s.w), w=(4, 5))
    plain = raise_error()
    pw.ProxProp().attach(model)
    assert raise_error() == plain


SCALES: dict[str, tuple[Forward, tuple[int, ...], tuple[int, ...]]] = {
    "channels": (lambda s, x: s.w * x, (4, 1, 1), (3, 4, 5, 5)),
    "a view of channels": (lambda s, x: x * s.w.view(1, -1, 1, 1), (4,), (3, 4, 5, 5)),
    "heads": (lambda s, x: x * s.w, (1, 2, 3), (7, 2, 3)),
    "features": (lambda s, x: s.w * x, (6,), (3, 5, 6)),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_is_solved_for_each_feature(name: str) -> None:
    run, of_weight, of_x = SCALES[name]
    model, x = Net(run, w=of_weight).double(), draw(*of_x).double()
    rule = pw.ProxProp(tau=2.0).attach(model, kinds="all")
    output = model(x)
    delta = 2 * output.detach()
    output.square().sum().backward()
    assert rule.explain().share == 1
    weight = model.w.detach().reshape((4, 1, 1) if "channels" in name else of_weight)
    axes = [a for a in range(x.dim()) if weight.dim() - x.dim() + a < 0 or weight.shape[a - x.dim()] == 1]
    solved = (delta * x).sum(axes) / (x.square().sum(axes) + 0.5)
    torch.testing.assert_close(model.w.grad, solved.reshape(of_weight))


def test_a_scale_that_no_features_have_is_left_alone() -> None:
    def run(s: Net, x: Tensor) -> Tensor:
        return s.l(s.of_rows * x * s.g.expand(5, 6))

    x, model = draw(3, 5, 6), Net(run, of_rows=(3, 1, 1), g=(5, 1), l=nn.Linear(6, 6))
    plain = copy.deepcopy(model)
    plain(x).square().mean().backward()
    rule = pw.ProxProp().attach(model, kinds="all")
    model(x).square().mean().backward()
    left = {key for row in rule.explain().rows if not row.handled for key in row.keys}
    assert left == {"of_rows", "g"}
    assert torch.equal(model.of_rows.grad, plain.of_rows.grad)
    assert torch.equal(model.g.grad, plain.g.grad)


def test_a_standardised_weight_is_a_computed_one() -> None:
    """As NF-ResNets have it: a batch norm over the weight, and a gain that is computed itself."""

    def run(s: Net, x: Tensor) -> Tensor:
        rows = s.c.weight.reshape(1, 4, -1)
        weight = F.batch_norm(rows, None, None, weight=(0.5 * s.gain).view(-1), training=True)
        return F.conv2d(x, weight.reshape_as(s.c.weight), s.c.bias)

    parts = {"c": nn.Conv2d(2, 4, 3), "gain": (4, 1, 1, 1)}
    model, plain = Net(run, **parts), Net(run, **copy.deepcopy(parts))
    plain.load_state_dict(model.state_dict())
    x = draw(3, 2, 6, 6)
    calls = []
    rule = pw.Backprop().attach(model, kinds="all")
    with rule.observing(lambda call, update, below: calls.append(call.name)):
        model(x).square().mean().backward()
    plain(x).square().mean().backward()
    assert rule.explain().share == 1
    assert len(calls) == 1  # the norm is no call of its own: the rule would act twice
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_every_parameter_is_in_one_row_and_biases_where_they_are_added() -> None:
    """An autoencoder with tied weights, whose biases another module owns, and a scaled layer."""

    def run(s: Net, x: Tensor) -> Tensor:
        code = F.relu(F.linear(x, 0.5 * s.scaled.weight, 0.1 * s.scaled.bias))
        return s.lstm(F.linear(F.relu(s.enc(code)), s.enc.weight.t(), s.back))[0]

    model = Net(run, scaled=nn.Linear(6, 6), enc=nn.Linear(6, 4), back=(6,), lstm=nn.LSTM(6, 3))
    plain = copy.deepcopy(model)
    rule = pw.ProxProp().attach(model)
    x = draw(5, 6)
    model(x).square().mean().backward()
    plain(x).square().mean().backward()
    rows = rule.explain().rows
    keys = [key for row in rows for key in row.keys]
    names = {name for name, _ in model.named_parameters()}
    assert sorted(keys) == sorted(names)
    handled = {key for row in rows if row.handled for key in row.keys}
    assert handled == {name for name in names if not name.startswith("lstm")}
    share = sum(p.numel() for name, p in model.named_parameters() if name in handled)
    assert rule.explain().share == share / sum(p.numel() for p in model.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name not in handled:
            assert torch.equal(ours.grad, theirs.grad)


class HandNorm(nn.Module):
    """An RMS norm as Llama has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


RESUMED: dict[str, Callable[[], nn.Module]] = {
    "a norm by hand": lambda: nn.Sequential(nn.Linear(6, 8), HandNorm(8), nn.Linear(8, 3)),
    "a bias apart": lambda: Net(lambda s, x: (s.l.weight @ x.mT).mT + s.l.bias, l=nn.Linear(6, 6)),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("kind", [pw.Foof, pw.KFAC, pw.RLS])
def test_statistics_load_before_the_first_call(name: str, kind: type[Any]) -> None:
    settings = {} if kind is pw.RLS else MEMORY
    x, runs = draw(7, 6), []
    for _ in range(2):
        model = RESUMED[name]()
        optimizer = sgd(model)
        kind(**settings).attach(model, optimizer, kinds="all")
        runs.append((model, optimizer))
    (model, optimizer), (fresh, fresh_optimizer) = runs
    step(model, optimizer, x)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(model, optimizer, x)
        step(fresh, fresh_optimizer, x)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", [False, True])
def test_back_matching_measures_in_the_same_steps_after_a_resume(frozen: bool) -> None:
    """A branch that begins as zero is measured again in the next step; a frozen layer keeps no value."""

    def run(s: Net, x: Tensor) -> Tensor:
        return s.head(x + s.out(torch.tanh(s.branch(s.base(x)))))

    runs, x = [], draw(7, 6)
    for _ in range(2):
        parts = {name: nn.Linear(6, 6) for name in ("base", "branch", "out", "head")}
        model = Net(run, **parts)
        nn.init.zeros_(model.out.weight)
        model.base.requires_grad_(not frozen)
        model.head.requires_grad_(not frozen)
        optimizer = sgd(model)
        pw.BackMatching().attach(model, optimizer)
        runs.append((model, optimizer))
    (model, optimizer), (fresh, fresh_optimizer) = runs
    step(model, optimizer, x)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer, x)
        step(fresh, fresh_optimizer, x)
        for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            mine, its = optimizer.state.get(ours, {}), fresh_optimizer.state.get(theirs, {})
            assert all(mine[key] == its[key] for key in mine | its if "backward_scale" in key)


def test_back_matching_is_finite_where_nothing_arrives() -> None:
    """Values that shrink by 1e-20 on their way down, to inputs of 1e-20: 1 / (m_W E) is out of range."""

    def run(s: Net, x: Tensor) -> Tensor:
        return s.high(1e-20 * s.low(1e-20 * x))

    model = Net(run, low=nn.Linear(6, 6), high=nn.Linear(6, 6))
    before = model.low.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rule = pw.BackMatching(cap=1.0).attach(model, optimizer)
    step(model, optimizer, draw(7, 6))
    assert not rule.health.counts
    moved = torch.linalg.vector_norm(model.low.weight - before)
    torch.testing.assert_close(moved, 0.5 * torch.linalg.vector_norm(before))


@pytest.mark.parametrize("rule", [pw.ProxProp(), pw.Foof(**MEMORY)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("how", ["jvp", "vmap", "grad", "both"])
def test_calls_under_torch_func_keep_their_plain_gradients(rule: pw.Rule, how: str) -> None:
    def run(s: Net, x: Tensor) -> Tensor:
        if how == "vmap":
            return torch.vmap(s.l)(x)
        if how == "grad":
            return torch.func.grad(lambda t: s.l(t).square().sum())(x)
        tangent = torch.func.jvp(s.l, (x,), (torch.ones_like(x),))[1]
        return tangent if how == "jvp" else s.l(tangent)

    model, x, rule = Net(run, l=nn.Linear(6, 6), head=nn.Linear(6, 6)), draw(5, 6), copy.copy(rule)
    plain = copy.deepcopy(model)
    optimizer = sgd(model)
    rule.attach(model, optimizer)
    for network in (model, plain):
        network(x).square().mean().backward()
    if how != "both":
        assert torch.equal(model.l.weight.grad, plain.l.weight.grad)
    optimizer.step()
    row = next(row for row in rule.explain().rows if "l.weight" in row.keys)
    assert "torch.func" in row.reason
    assert row.handled is (how == "both")


@pytest.mark.parametrize("rule", [pw.ProxProp(), pw.Foof(**MEMORY), pw.BackMatching()], ids=str)
def test_calls_by_name_under_torch_func_keep_their_plain_gradients(rule: pw.Rule) -> None:
    # torch hands the weight of a norm on by its name
    model, x, rule = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), draw(5, 6), copy.copy(rule)
    plain = copy.deepcopy(model)
    rule.attach(model, sgd(model), kinds="all")
    for network in (model, plain):
        torch.vmap(network)(x).square().mean().backward()
    gradients = [[p.grad for p in network.parameters()] for network in (model, plain)]
    assert all(map(torch.equal, *gradients))
    assert all("torch.func" in row.reason for row in rule.explain().rows if row.name in ("0", "1"))


@pytest.mark.parametrize("kind", [pw.Foof, pw.Coordinates])
def test_other_weights_in_functional_call_are_no_lost_parameters(kind: type[Any]) -> None:
    x, ends = draw(40, 6), []
    for asks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        teacher = {name: p.detach() + 1 for name, p in model.named_parameters()}
        optimizer = sgd(model)
        kind(stats_every=10, refresh_every=10).attach(model, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            if asks:
                torch.func.functional_call(model, teacher, (x,))
            model(x).square().mean().backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_a_conv1d_of_transformers_is_named_before_its_first_call() -> None:
    utilities = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(utilities.Conv1D(8, 6), nn.ReLU(), nn.Linear(8, 3))
    rule = pw.Foof(**MEMORY).attach(model, sgd(model))
    before = rule.explain()
    assert before.share == 1
    assert before.rows[0].reason == "waits for its first batch"
    model(draw(5, 6)).sum().backward()
    assert [row.keys for row in rule.explain().rows] == [row.keys for row in before.rows]


@pytest.mark.parametrize("make", [lambda m: [m], lambda m: "m", lambda m: None, lambda m: m.parameters()])
def test_what_is_no_module_is_refused(make: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(pw.AttachError, match=r"needs a torch\.nn\.Module"):
        pw.ProxProp().attach(make(model), sgd(model))


@pytest.mark.parametrize("kind", [pw.ProxProp, pw.Foof])
def test_other_arguments_of_a_wrong_kind_are_refused(kind: type[Any]) -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(pw.AttachError, match="process_group must be"):
        kind().attach(model, sgd(model), process_group="gloo")
    rule = kind().attach(model, sgd(model))
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        rule.explain(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [pw.ProxProp, pw.Foof])
def test_traced_and_scripted_models(kind: type[Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = draw(5, 6)
    for made in (torch.jit.trace(model, x), torch.jit.script(model)):
        with pytest.raises(pw.AttachError, match="scripted or traced"):
            kind().attach(made, sgd(model))
    kind().attach(model, sgd(model))
    traced = torch.jit.trace(model, x)  # torch checks it against the model
    assert torch.equal(traced(x), model(x))
    with pytest.raises(pw.UncapturedLayerError):
        traced(x).sum().backward()


def test_what_computes_a_weight_is_no_other_use_of_it() -> None:
    """weight_norm before attach: the update goes on through its own function."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 2))
    rule = pw.ProxProp().attach(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(2):
        model(torch.randn(3, 8)).sum().backward()
    assert "_weight_norm" not in str(rule.explain())


@pytest.mark.parametrize("axis", [1, -1])
def test_a_scales_gradient_is_autograds_to_the_bit_whatever_the_strides(axis: int) -> None:
    """A resumed run captures a call that rests in the run that it goes on from: the same sums, then."""

    def run(s: Net, x: Tensor) -> Tensor:
        scaled = x * s.scale[None, :, None] if axis == 1 else x * s.scale
        # the gradient comes back in another order of memory than the input has
        return (scaled.transpose(1, 2) @ torch.ones(x.shape[1], 3)).sin()

    torch.manual_seed(0)
    model, x = Net(run, scale=(16,)), torch.randn(3, 16, 7) if axis == 1 else torch.randn(3, 5, 16)
    found = []
    for attached in (False, True):
        model.zero_grad()
        if attached:
            rule = pw.Backprop().attach(model, kinds="all")
        model(x).sum().backward()
        found.append(model.scale.grad.clone())
    assert rule.explain().share == 1
    assert torch.equal(*found)
