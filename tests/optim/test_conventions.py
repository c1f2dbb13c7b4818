"""What torch users expect of any optimizer, asked of each of ours."""

import copy

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from plywise.errors import PlywiseError
from plywise.optim import KLSOAP, LRSGDC, LRSGDR, SOAP, ASkewSGD, Muon, NorMuon, SalpSGD, YamAdam
from sameness import same

MAKERS = {
    "LRSGDR": lambda params, **more: LRSGDR(params, **{"lr": 0.02, "stop": 0.3, **more}),
    "LRSGDC": lambda params, **more: LRSGDC(params, **{"lr": 0.05, "inner_steps": 3, **more}),
    "YamAdam": YamAdam,
    "ASkewSGD": lambda params, **more: ASkewSGD(
        params, **{"lr": 0.05, "steps_per_epoch": 2, "hold": 2, "decay": 0.8, **more}
    ),
    "Muon": lambda params, **more: Muon(params, **{"lr": 0.05, **more}),
    "NorMuon": lambda params, **more: NorMuon(params, **{"lr": 0.05, **more}),
    "SOAP": lambda params, **more: SOAP(params, **{"lr": 0.05, "precondition_frequency": 2, **more}),
    "KLSOAP": lambda params, **more: KLSOAP(params, **{"lr": 0.05, "precondition_frequency": 2, **more}),
    "SalpSGD": lambda params, **more: SalpSGD(params, **{"lr": 0.05, "total_steps": 20, **more}),
}
WITHOUT_CLOSURE = [name for name in MAKERS if name != "SalpSGD"]

every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
plain = pytest.mark.parametrize("make", [MAKERS[name] for name in WITHOUT_CLOSURE], ids=WITHOUT_CLOSURE)
WITH_RATE = [name for name in MAKERS if name != "YamAdam"]
with_rate = pytest.mark.parametrize("make", [MAKERS[name] for name in WITH_RATE], ids=WITH_RATE)


def parameters(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.rand(shape, dtype=dtype, generator=generator) - 0.5) for shape in shapes]


def pull_to(params, target=0.3):
    """A closure: the gradient of ½‖w − target‖² over all parameters."""

    def closure():
        for param in params:
            param.grad = None
        loss = sum((param - target).square().sum().double() for param in params) / 2
        loss.backward()
        return loss

    return closure


def train(optimizer, params, steps):
    return [optimizer.step(pull_to(params)).item() for _ in range(steps)]


def values(params):
    return [param.detach().clone() for param in params]


@every
@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((),), ((0, 3), (2,)), ((2, 3, 1, 2),)], ids=str)
def test_goes_down_on_tensors_of_every_shape(make, shapes):
    params = parameters(*shapes)
    losses = train(make(params), params, 4)
    assert losses[-1] < losses[0]


@every
def test_mixed_dtypes_keep_their_own(make):
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    params = [parameters((3,), dtype=dtype)[0] for dtype in dtypes]
    losses = train(make(params), params, 4)
    assert losses[-1] < losses[0]
    assert [param.dtype for param in params] == dtypes


@every
def test_a_tensor_that_is_not_contiguous_moves_as_one_that_is(make):
    dense = parameters((4, 6))
    strided = [torch.nn.Parameter(dense[0].detach().t().contiguous().t())]
    assert not strided[0].is_contiguous()
    train(make(dense), dense, 6)
    train(make(strided), strided, 6)
    if make is not MAKERS["SalpSGD"]:  # its draws follow the memory's order
        torch.testing.assert_close(strided[0], dense[0])
    assert not strided[0].is_contiguous()


@every
def test_a_tensor_alone_or_nothing_is_refused_as_by_torch(make):
    with pytest.raises(TypeError):
        make(torch.zeros(2, requires_grad=True))
    with pytest.raises(ValueError, match="empty"):
        make([])


@every
def test_generator_groups_and_names_are_taken(make):
    model = torch.nn.Linear(3, 2)
    given = (
        model.parameters(),
        model.named_parameters(),
        [{"params": model.weight}, {"params": [model.bias]}],
    )
    for params in given:
        groups = make(params).param_groups
        assert [p for group in groups for p in group["params"]] == list(model.parameters())


@with_rate
def test_a_group_has_its_own_rate(make):
    still, moving = parameters((3,), (3,))
    before = still.detach().clone()
    extra = {"radius": 0.0} if make is MAKERS["SalpSGD"] else {}
    optimizer = make([{"params": [still], "lr": 0.0}, {"params": [moving]}], **extra)
    losses = train(optimizer, [still, moving], 5)
    assert torch.equal(still, before)
    assert losses[-1] < losses[0]


@with_rate
def test_rate_as_tensor_is_rate_as_number(make):
    by_tensor, by_number = parameters((3, 2)), parameters((3, 2))
    train(make(by_tensor, lr=torch.tensor(0.0625)), by_tensor, 5)
    train(make(by_number, lr=0.0625), by_number, 5)
    assert same(by_tensor, by_number)


@with_rate
def test_schedulers_turn_the_rate(make):
    params = parameters((3,))
    extra = {"radius": 0.0} if make is MAKERS["SalpSGD"] else {}
    optimizer = make(params, momentum=0.0, **extra) if "LRSGD" in str(make(params)) else make(params, **extra)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step < 2 else 1.0)
    before = values(params)
    for _ in range(2):
        train(optimizer, params, 1)
        scheduler.step()
        assert all(torch.isfinite(param).all() for param in params)
    assert same(params, before)
    train(optimizer, params, 1)
    assert not same(params, before)


@every
def test_parameters_without_gradient_stay_and_get_no_state(make):
    used, unused, frozen = parameters((3,), (3,), (3,))
    frozen.requires_grad_(False)
    before = values([unused, frozen])
    optimizer = make([used, unused, frozen])
    train(optimizer, [used], 6)
    assert same([unused, frozen], before)
    assert unused not in optimizer.state
    assert frozen not in optimizer.state


@plain
def test_a_step_without_any_gradient_changes_nothing(make):
    params = parameters((3,))
    optimizer = make(params)
    train(optimizer, params, 3)
    optimizer.zero_grad()
    before, state = values(params), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert same(params, before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for name, value in state["state"].get(0, {}).items():
        assert torch.equal(torch.as_tensor(after["state"][0][name]), torch.as_tensor(value))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit_three_times_over(make, dtype, tmp_path):
    whole = parameters((3, 2), (), dtype=dtype)
    optimizer = make(whole)
    parts = [torch.nn.Parameter(param.detach().clone()) for param in whole]
    train(optimizer, whole, 20)
    resumed = make(parts)
    for steps in (3, 6, 6, 5):
        train(resumed, parts, steps)
        torch.save({"optimizer": resumed.state_dict(), "params": values(parts)}, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        parts = [torch.nn.Parameter(value) for value in saved["params"]]
        resumed = make(parts)
        resumed.load_state_dict(saved["optimizer"])
    assert same(parts, whole)


@every
def test_a_copy_goes_its_own_way_from_the_same_state(make):
    params = parameters((3,))
    optimizer = make(params)
    train(optimizer, params, 4)
    twin = copy.deepcopy(optimizer)
    theirs = twin.param_groups[0]["params"]
    train(optimizer, params, 4)
    assert not same(theirs, params)
    train(twin, theirs, 4)
    assert same(theirs, params)


@every
def test_a_group_added_later_moves(make):
    first, second = parameters((3,), (3,))
    optimizer = make([first])
    train(optimizer, [first], 3)
    optimizer.add_param_group({"params": [second]})
    before = second.detach().clone()
    train(optimizer, [first, second], 3)
    assert not torch.equal(second, before)


@every
def test_closure_runs_with_gradients_on_and_its_first_loss_is_returned(make):
    params = parameters((3,))
    optimizer = make(params)
    before = pull_to(params)().item()
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        return pull_to(params)()

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss.item() == before
    assert all(seen)
    assert params[0].requires_grad
    assert params[0].grad_fn is None


@every
def test_gradients_are_left_as_they_were(make):
    params = parameters((3,))
    optimizer = make(params)
    for _ in range(4):
        pull_to(params)()
        before = params[0].grad.clone()
        optimizer.step(pull_to(params))
        assert torch.equal(params[0].grad, before)


@plain
def test_maximize_is_minimizing_the_opposite(make):
    up, down = parameters((3, 2)), parameters((3, 2))
    upward, downward = make(up, maximize=True), make(down)
    for _ in range(8):
        for params, sign in ((up, -1), (down, 1)):
            pull_to(params)()
            params[0].grad.mul_(sign)
        upward.step()
        downward.step()
    assert same(up, down)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [Muon, NorMuon, SOAP, KLSOAP])
def test_optimizers_for_matrices_refuse_parameters_spread_over_processes_by_name(kind, mesh):
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = kind([weight], lr=0.1)
    weight.square().sum().backward()
    with pytest.raises(PlywiseError, match=rf"{kind.__name__} needs whole matrices; .* \(4, 3\) is spread"):
        optimizer.step()
    assert weight.to_local().eq(1).all()


@every
def test_sparse_gradients_are_refused_by_name_before_anything_moves(make):
    embedding, other = torch.nn.Embedding(5, 2, sparse=True), parameters((3,))[0]
    optimizer = make([{"params": [other]}, {"params": embedding.parameters()}])
    before = values([other, embedding.weight])

    def closure():
        optimizer.zero_grad()
        loss = embedding(torch.tensor([1])).sum() + other.sum()
        loss.backward()
        return loss

    with pytest.raises(PlywiseError, match=f"{type(optimizer).__name__}.*sparse"):
        optimizer.step(closure)
    assert same([other, embedding.weight], before)


@every
def test_complex_gradients_are_refused_by_name(make):
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))

    def closure():
        loss = weight.abs().square().sum()
        loss.backward()
        return loss

    with pytest.raises(PlywiseError, match="complex"):
        make([weight]).step(closure)


WRONG = [
    (LRSGDR, {"lr": -0.1}, "lr"),
    (LRSGDR, {"lr": float("nan")}, "lr"),
    (LRSGDR, {"lr": torch.ones(2)}, "lr"),
    (LRSGDR, {"strength": -1.0}, "strength"),
    (LRSGDR, {"momentum": 1.5}, "momentum"),
    (LRSGDR, {"weight_decay": -1e-4}, "weight_decay"),
    (LRSGDR, {"stop": 0.0}, "stop"),
    (LRSGDR, {"stop": 1.1}, "stop"),
    (LRSGDR, {"seed": 0.5}, "seed"),
    (LRSGDC, {"inner_steps": 0}, "inner_steps"),
    (LRSGDC, {"inner_steps": 2.5}, "inner_steps"),
    (YamAdam, {"eps": 0.0}, "eps"),
    (YamAdam, {"eps": "small"}, "eps"),
    (Muon, {"lr": -1.0}, "lr"),
    (Muon, {"momentum": 1.5}, "momentum"),
    (Muon, {"weight_decay": -0.1}, "weight_decay"),
    (Muon, {"ns_steps": 0}, "ns_steps"),
    (Muon, {"ns_coefficients": (1.0, 2.0)}, "ns_coefficients"),
    (Muon, {"adjust_lr_fn": "mine"}, "adjust_lr_fn"),
    (Muon, {"betas": (0.9, 1.0)}, "betas"),
    (NorMuon, {"beta2": -0.1}, "beta2"),
    (SOAP, {"lr": float("inf")}, "lr"),
    (SOAP, {"betas": 0.9}, "betas"),
    (SOAP, {"shampoo_beta": 1.5}, "shampoo_beta"),
    (SOAP, {"eps": -1.0}, "eps"),
    (SOAP, {"weight_decay": float("nan")}, "weight_decay"),
    (SOAP, {"precondition_frequency": 0}, "precondition_frequency"),
    (SOAP, {"max_precondition_dim": 1.5}, "max_precondition_dim"),
    (KLSOAP, {"betas": (0.9, 2.0)}, "betas"),
    (ASkewSGD, {"steps_per_epoch": 0}, "steps_per_epoch"),
    (ASkewSGD, {"steps_per_epoch": 5, "levels": (1.0,)}, "levels"),
    (ASkewSGD, {"steps_per_epoch": 5, "levels": (1.0, -1.0)}, "levels"),
    (ASkewSGD, {"steps_per_epoch": 5, "levels": (0.0, float("inf"))}, "levels"),
    (ASkewSGD, {"steps_per_epoch": 5, "hold": -1}, "hold"),
    (ASkewSGD, {"steps_per_epoch": 5, "decay": 1.5}, "decay"),
    (ASkewSGD, {"steps_per_epoch": 5, "alpha": 0.0}, "alpha"),
    (SalpSGD, {"total_steps": 0}, "total_steps"),
    (SalpSGD, {"total_steps": 5, "salps": 0}, "salps"),
    (SalpSGD, {"total_steps": 5, "radius": -0.1}, "radius"),
    (SalpSGD, {"total_steps": 5, "seed": None}, "seed"),
]


@pytest.mark.parametrize(("kind", "settings", "name"), WRONG)
def test_wrong_settings_are_refused_by_name(kind, settings, name):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {name}"):
        kind(parameters((2,)), **settings)


@pytest.mark.parametrize(("kind", "settings", "name"), [w for w in WRONG if not {"total_steps"} & set(w[1])])
def test_wrong_settings_of_a_later_group_are_refused_and_leave_no_group(kind, settings, name):
    first, second = parameters((2,), (2,))
    optimizer = kind([first], **({"steps_per_epoch": 5} if kind is ASkewSGD else {}))
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [second], **settings})
    assert len(optimizer.param_groups) == 1
