"""Muon: its definition in float64, torch's own, the batches by shape, the parameters that are no matrices."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from plywise.numerics.polar import COEFFICIENTS
from plywise.optim import KLSOAP, SOAP, Muon, NorMuon
from plywise.optim.hidden_weights import find_hidden_weights, group_for_muon
from plywise.optim.muon import THREE_ITERATIONS, has_bfloat16_products

SHAPES = ((6, 6), (8, 5), (6, 6), (5, 8), (4, 3, 2, 2), (8, 5))


def start(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [nn.Parameter(draw.to(dtype)) for draw in draws]


def run(optimizer, params, steps=8, among=None):
    """Steps on the same random gradients, whatever the optimizer; ``among`` says who has one in a step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for place, param in enumerate(params):
            gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
            param.grad = gradient if among is None or among(step, place) else None
        optimizer.step()
    return [param.detach().clone() for param in params]


def define(weight, gradients, ratio, lr, decay, momentum, nesterov, rows=None):
    """Muon one matrix at a time, written out; with ``rows`` NorMuon."""
    w, buffer, squares = weight.flatten(1), 0, 0
    for gradient in gradients:
        g = gradient.flatten(1)
        buffer = momentum * buffer + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * buffer if nesterov else buffer
        x = x / x.square().sum().sqrt()
        for _ in range(5):
            a, b, c = COEFFICIENTS
            x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
        if rows is not None:
            squares = rows * squares + (1 - rows) * x.square().mean(1, keepdim=True)
            x = x / squares.sqrt()
            x = x / x.square().sum().sqrt()
        w = (1 - lr * decay) * w - lr * ratio(*w.shape) * x
    return w.view(weight.shape)


RATIOS = {
    None: lambda m, n: math.sqrt(max(1, m / n)),
    "original": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "balanced": lambda m, n: (0.2 * math.sqrt(max(m, n)) * 1.6 * math.sqrt(m / n)) ** 0.5,
}
TORCHS = (None, "original", "match_rms_adamw")


@pytest.mark.parametrize("adjust", RATIOS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_its_definition(adjust, nesterov, dtype):
    numbers = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9}
    params = start(dtype=dtype)
    first, given = start(), seen()
    found = run(Muon(params, adjust_lr_fn=adjust, nesterov=nesterov, **numbers), params)
    for place, weight in enumerate(first):
        gradients = [step[place] for step in given]
        wanted = define(weight.detach(), gradients, RATIOS[adjust], 0.02, 0.3, 0.9, nesterov)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found[place].double(), wanted, rtol=0, atol=tolerance)


def seen(steps=8):
    """The gradients that `run` gives."""
    given = []

    class Watch:
        def step(self):
            given.append([param.grad.clone() for param in params])

    params = start()
    run(Watch(), params, steps)
    return given


def test_nor_muon_equals_its_definition():
    params, given = start(), seen()
    found = run(NorMuon(params, lr=0.02, weight_decay=0.3, momentum=0.9, beta2=0.8), params)
    for place, weight in enumerate(start()):
        gradients = [step[place] for step in given]
        size = lambda m, n: 0.2 * math.sqrt(m * n)  # noqa: E731
        wanted = define(weight.detach(), gradients, size, 0.02, 0.3, 0.9, True, rows=0.8)
        torch.testing.assert_close(found[place], wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("adjust", TORCHS)
@pytest.mark.parametrize("shape", [(120, 100), (100, 160), (24, 40), (40, 24)], ids=str)
def test_equals_torchs_muon(adjust, shape):
    ours, theirs = (start([shape, shape], torch.float32) for _ in range(2))
    found = run(Muon(ours, lr=1e-3, adjust_lr_fn=adjust, ns_dtype=torch.bfloat16), ours)
    wanted = run(torch.optim.Muon(theirs, lr=1e-3, adjust_lr_fn=adjust), theirs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_large_matrices_are_iterated_in_a_precision_that_the_processor_multiplies():
    """torch multiplies bfloat16 on any CPU, but on most of them up to 45 times slower than float32."""
    fast, other = torch.bfloat16, torch.float32
    if not has_bfloat16_products():
        fast, other = other, fast
    by_default, explicit, apart = (start([(100, 120)], torch.float32) for _ in range(3))
    found = run(Muon(by_default, lr=0.1), by_default)[0]
    assert torch.equal(found, run(Muon(explicit, lr=0.1, ns_dtype=fast), explicit)[0])
    assert not torch.equal(found, run(Muon(apart, lr=0.1, ns_dtype=other), apart)[0])


def test_what_is_no_matrix_and_what_says_so_moves_by_adamw():
    shapes = ((4, 3), (3,), (), (5, 2))
    ours, theirs = start(shapes), start(shapes)
    numbers = {"lr": 0.05, "weight_decay": 0.2, "betas": (0.8, 0.9)}
    groups = [{"params": ours[:3]}, {"params": ours[3:], "use_muon": False, "lr": 0.01}]
    found = run(Muon(groups, adamw_eps=1e-6, **numbers), ours)
    adamw = [{"params": theirs[:3]}, {"params": theirs[3:], "lr": 0.01}]
    wanted = run(torch.optim.AdamW(adamw, eps=1e-6, **numbers), theirs)
    for place in (1, 2, 3):
        torch.testing.assert_close(found[place], wanted[place], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0], wanted[0])


def test_each_iteration_may_have_its_own_coefficients():
    params = start()
    numbers = {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.9}
    twice = run(Muon(params, ns_coefficients=[COEFFICIENTS] * 2, ns_steps=2, **numbers), params)
    again = start()
    for found, wanted in zip(twice, run(Muon(again, ns_steps=2, **numbers), again), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="three for each of the 5 iterations"):
        Muon(start(), ns_coefficients=THREE_ITERATIONS)


STACKED = {
    "Muon": lambda params: Muon(params, lr=0.05),
    "NorMuon": lambda params: NorMuon(params, lr=0.05),
    "SOAP": lambda params: SOAP(params, lr=0.05, precondition_frequency=2),
    "SOAP staggered": lambda params: SOAP(params, lr=0.05, precondition_frequency=3, stagger=True),
    "KLSOAP": lambda params: KLSOAP(params, lr=0.05, precondition_frequency=2),
}
stacked = pytest.mark.parametrize("make", STACKED.values(), ids=STACKED)
ALIKE = [
    name for name in STACKED if name != "SOAP staggered"
]  # there a side's turn depends on how many there are
alike = pytest.mark.parametrize("make", [STACKED[name] for name in ALIKE], ids=ALIKE)
MIXED = ((6, 5), (6, 5), (6, 5), (5,), (4,), (3, 2, 2))


@alike
def test_a_parameter_moves_as_if_it_were_alone(make):
    """Also if others of its shape skip steps: no step count or state of theirs is taken for its own."""
    among = lambda step, place: (step + place) % 3 > 0 or place == 2  # noqa: E731
    params = start(MIXED)
    together = run(make(params), params, 9, among)
    for place in range(len(MIXED)):
        alone = start(MIXED)
        only = run(make([alone[place]]), alone, 9, among)
        torch.testing.assert_close(together[place], only[place], rtol=1e-9, atol=1e-9)


@stacked
def test_resumes_bit_for_bit_with_stacks_of_several(make):
    whole = start(MIXED, torch.float32)
    straight = run(make(whole), whole, 12)
    params = start(MIXED, torch.float32)
    optimizer = make(params)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        if step in (3, 4, 8):
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make(params)
            optimizer.load_state_dict(state)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).float()
        optimizer.step()
    for one, other in zip(params, straight, strict=True):
        assert torch.equal(one, other)


@stacked
def test_a_loaded_state_is_no_longer_shared_with_who_gave_it(make):
    ours, theirs = start(MIXED), start(MIXED)
    giver, taker = make(ours), make(theirs)
    run(giver, ours, 4)
    taker.load_state_dict(giver.state_dict())
    kept = copy.deepcopy(giver.state_dict()["state"])
    run(taker, theirs, 4)
    for number, state in giver.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[number][name])), name


@stacked
def test_a_cleared_state_begins_again(make):
    fresh, used = start(MIXED), start(MIXED)
    optimizer = make(used)
    run(optimizer, used, 4)
    optimizer.state.clear()
    with torch.no_grad():
        torch._foreach_copy_(used, start(MIXED))
    for one, other in zip(run(optimizer, used, 5), run(make(fresh), fresh, 5), strict=True):
        assert torch.equal(one, other)


@stacked
def test_a_group_of_one_shape_added_later_has_its_own_count(make):
    first, late = start(((4, 4), (4, 4)))
    optimizer = make([first])
    run(optimizer, [first], 3)
    optimizer.add_param_group({"params": [late]})
    run(optimizer, [first, late], 4)
    assert optimizer.state[first]["step"] == 7
    assert optimizer.state[late]["step"] == 4


@stacked
@pytest.mark.parametrize("parts", [1, 4])
def test_no_step_reads_a_number_back(make, parts):
    """Each such reading makes a GPU wait."""
    params = start(((6, 5), (5,)) * parts, torch.float32)
    optimizer = make(params)
    run(optimizer, params, 2)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run_without_draws(optimizer, params, 6)
    names = [event.name for event in record.events()]
    assert "aten::bmm" in names
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"} & set(names)


def run_without_draws(optimizer, params, steps):
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()


@alike
def test_layers_of_one_shape_share_their_products(make):
    counts = []
    for layers in (1, 5):
        params = start(((6, 5),) * layers, torch.float32)
        optimizer = make(params)
        run(optimizer, params, 2)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            run_without_draws(optimizer, params, 1)
        counts.append(sum(event.name in ("aten::bmm", "aten::baddbmm") for event in record.events()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("adjust", [*RATIOS, "NorMuon"])
def test_transposed_matrices_move_as_the_others(adjust):
    make = NorMuon if adjust == "NorMuon" else functools.partial(Muon, adjust_lr_fn=adjust)
    draws = [p.detach() for p in start([(6, 10), (10, 4), (8, 8)])]
    plain = [nn.Parameter(draw.clone()) for draw in draws]
    turned = [nn.Parameter(draw.T.clone()) for draw in draws]
    optimizers = make(plain, lr=0.1), make([{"params": turned, "transposed": True}], lr=0.1)
    for step in range(6):
        for one, other in zip(plain, turned, strict=True):
            one.grad = torch.sin(torch.arange(one.numel(), dtype=torch.float64) * (step + 1)).view_as(one)
            other.grad = one.grad.T.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(plain, turned, strict=True):
        torch.testing.assert_close(one, other.T, rtol=0, atol=1e-12)


class Experts(nn.Module):
    """Several matrices in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4, 4))


def test_weights_that_are_stored_as_in_out_are_a_group_of_their_own():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 2),
        Experts(),
        nn.Linear(4, 4),
        nn.Linear(4, 2),
    )
    groups = group_for_muon(model, find_hidden_weights(model))
    shapes = [[tuple(p.shape) for p in group["params"] if p.dim() > 1] for group in groups]
    assert shapes[0] == [(8, 3, 3, 3), (4, 4)]
    assert shapes[1] == [(8, 4, 2, 2)]
    assert shapes[2] == [(8, 1, 3, 3), (3, 4, 4), (2, 4)], "several matrices in one are left to AdamW"
    assert [group.get("transposed", False) for group in groups] == [False, True, False]


def test_gpt2s_matrices_are_transposed():
    transformers = pytest.importorskip("transformers")
    sizes = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(sizes)
    (group, _) = group_for_muon(model, find_hidden_weights(model))
    assert group["transposed"]
    assert sorted(tuple(p.shape) for p in group["params"]) == [(8, 8), (8, 24), (8, 32), (32, 8)]
