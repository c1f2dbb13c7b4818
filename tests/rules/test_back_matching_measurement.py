"""When back-matching's rate measures ``E``, which passes use it, and where it is kept."""

import pytest
import torch
from backward_scales import collect_scales, find_scales, read_kept
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


class Counting(nn.Module):
    """Counts backward passes between two layers: one more in a pass that measures."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(self.add)
        return h

    def add(self, gradient: Tensor) -> None:
        self.count += 1


def make_model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), Counting(), nn.ReLU(), nn.Linear(8, 3))


def make_batch(seed: int, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


class Run:
    """A training whose measurements can be looked at."""

    def __init__(self, rule: pw.Rule | None = None, seed: int = 1, make: type[Optimizer] = SGD) -> None:
        self.model = make_model(seed)
        options = {"momentum": 0.9} if make is SGD else {}
        self.optimizer = make(self.model.parameters(), lr=0.01, **options)
        self.rule = (pw.BackMatching() if rule is None else rule).attach(self.model, self.optimizer)

    def compute_loss(self, seed: int, n: int = 12) -> Tensor:
        x, y = make_batch(seed, n)
        return cross_entropy(self.model(x), y)

    def backward(self, seed: int, n: int = 12) -> dict[str, list[float]]:
        """``E`` of each layer in one backward pass."""
        with collect_scales(self.rule) as scales:
            self.compute_loss(seed, n).backward()
        return scales

    def step(self, seed: int) -> dict[str, list[float]]:
        self.optimizer.zero_grad()
        scales = self.backward(seed)
        self.optimizer.step()
        return scales

    def count_measurements(self, seed: int) -> int:
        before = self.model[3].count
        self.step(seed)
        return self.model[3].count - before - 1

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- when it measures ------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4, 10])
def test_a_measurement_every_so_many_steps(every):
    run = Run(pw.BackMatching(measure_every=every))
    assert [run.count_measurements(step) for step in range(12)] == [
        int(step % every == 0) for step in range(12)
    ]


def test_the_first_one_is_used_at_once_and_later_ones_from_the_next_step_on():
    run = Run(pw.BackMatching(measure_every=4))
    scales = [run.step(step) for step in range(10)]
    assert scales[0]["5"] == [1]
    assert scales[0]["0"] == find_scales(make_model(), make_batch(0)[0])["0"]
    for step in range(10):
        changes = step > 0 and scales[step] != scales[step - 1]
        assert changes == (step in (5, 9))


def test_without_an_optimizer_every_pass_measures_that_adds_to_no_gradient():
    model = make_model()
    rule = pw.BackMatching().attach(model)
    found = []
    for seed in (1, 2, 3):
        if seed != 3:
            model.zero_grad()
        with collect_scales(rule) as scales:
            x, y = make_batch(seed)
            cross_entropy(model(x), y).backward()
        found.append(scales["0"])
    assert found[0] != found[1] == found[2]
    assert model[3].count == 5


def test_micro_batches_of_a_step_use_the_same_measurement():
    run = Run(pw.BackMatching(measure_every=3))
    for step in range(5):
        run.optimizer.zero_grad()
        before = run.model[3].count
        scales = [run.backward(10 * step + part, n) for part, n in enumerate((12, 5, 3))]
        assert scales[0] == scales[1] == scales[2]
        assert run.model[3].count - before == 3 + (step % 3 == 0)
        run.optimizer.step()


def test_a_branch_that_begins_as_zero_is_measured_again():
    """Nothing arrives behind a weight of zeros: no update, for one step."""
    run = Run()
    with torch.no_grad():
        run.model[5].weight.zero_()
    assert run.step(0)["0"] == [0]
    assert not run.model[0].weight.grad.any()
    run.step(1)
    assert run.step(2)["0"][0] > 0
    assert run.model[0].weight.grad.any()


def test_the_random_vector_is_another_one_in_each_measurement():
    run = Run(pw.BackMatching(measure_every=1))
    run.optimizer.param_groups[0]["lr"] = 0.0
    scales = [run.step(0)["0"][0] for _ in range(4)]
    assert len(set(scales)) == 3  # the first one holds for two steps


# ---- where it is kept --------------------------------------------------------------------------------


def test_values_are_in_the_optimizers_state():
    run = Run()
    scales = run.step(0)
    for i in (0, 2, 5):
        state = run.optimizer.state[run.model[i].weight]
        assert read_kept(state) == scales[f"{i}"]
        assert state["plywise.backward_scale.step"] == 1
    run.rule.reset()
    keys = {key for state in run.optimizer.state.values() for key in state}
    assert keys == {"momentum_buffer"}
    assert run.count_measurements(1) == 1
    run.rule.detach()
    assert {key for state in run.optimizer.state.values() for key in state} == {"momentum_buffer"}


@pytest.mark.parametrize("make", [SGD, Adam])
@pytest.mark.parametrize("saved_after", [1, 4, 5])
def test_a_resumed_run_goes_on_with_them(make, saved_after, tmp_path):
    run = Run(pw.BackMatching(measure_every=4), make=make)
    for step in range(saved_after):
        run.step(step)
    torch.save([run.model.state_dict(), run.optimizer.state_dict()], tmp_path / "state.pt")
    second = Run(pw.BackMatching(measure_every=4), seed=2, make=make)
    second.step(77)  # of another life
    of_model, of_optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    second.model.load_state_dict(of_model)
    second.optimizer.load_state_dict(of_optimizer)
    for step in range(saved_after, 12):
        assert run.step(step) == second.step(step)
    assert same(run.weights(), second.weights())


def test_state_that_is_loaded_before_attaching():
    run = Run()
    for step in range(3):
        run.step(step)
    model = make_model()
    model.load_state_dict(run.model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer.load_state_dict(run.optimizer.state_dict())
    rule = pw.BackMatching().attach(model, optimizer)
    x, y = make_batch(3)
    with collect_scales(rule) as scales:
        cross_entropy(model(x), y).backward()
    assert scales == run.step(3)


def test_state_of_a_run_without_the_rule_is_measured_anew():
    plain = make_model(2)
    optimizer = SGD(plain.parameters(), lr=0.01, momentum=0.9)
    x, y = make_batch(5)
    cross_entropy(plain(x), y).backward()
    optimizer.step()
    run = Run()
    run.step(0)
    with pytest.raises(pw.StateError, match=r"saved without the rule.*load it before attach\(\)"):
        run.optimizer.load_state_dict(optimizer.state_dict())
    run.rule.detach()
    run.optimizer.load_state_dict(optimizer.state_dict())
    with pytest.warns(RuntimeWarning, match="they begin from nothing"):
        run.rule.attach(run.model, run.optimizer)
    assert run.count_measurements(1) == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_carry_them_and_change_nothing(tmp_path):
    runs = [Run(pw.BackMatching(measure_every=4)) for _ in range(3)]
    for run in runs[:2]:
        for step in range(6):
            if run is runs[0]:
                get_state_dict(run.model, run.optimizer)
            run.step(step)
    assert same(runs[0].weights(), runs[1].weights())
    of_model, of_optimizer = get_state_dict(runs[0].model, runs[0].optimizer)
    saved = {"model": of_model, "optimizer": of_optimizer}
    torch.distributed.checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    of_model, of_optimizer = get_state_dict(runs[2].model, runs[2].optimizer)
    loaded = {"model": of_model, "optimizer": of_optimizer}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        runs[2].model,
        runs[2].optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    for step in range(6, 10):
        assert runs[2].step(step) == runs[1].step(step)
    assert same(runs[2].weights(), runs[1].weights())


# ---- passes that lead to no step ---------------------------------------------------------------------


def ask_for_gradients(run: Run) -> None:
    torch.autograd.grad(run.compute_loss(99), list(run.model.parameters()))


def ask_at_the_input(run: Run) -> None:
    x, y = make_batch(99)
    torch.autograd.grad(cross_entropy(run.model(x.requires_grad_()), y), x)


def drop_the_gradient(run: Run) -> None:
    run.backward(99)
    run.optimizer.zero_grad()


def zero_the_gradient(run: Run) -> None:
    run.backward(99)
    run.optimizer.zero_grad(set_to_none=False)


def fail_in_backward(run: Run) -> None:
    def fail(gradient: Tensor) -> None:
        raise KeyError

    h = run.model[:3](make_batch(99)[0])
    h.register_hook(fail)
    with pytest.raises(KeyError):
        run.model[3:](h).sum().backward()
    run.optimizer.zero_grad()


def skip_a_step(run: Run) -> None:
    x, y = make_batch(99)
    x[0] = torch.nan
    cross_entropy(run.model(x), y).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        run.optimizer.step()
    run.optimizer.zero_grad()


def take_a_template_step(run: Run) -> None:
    run.backward(99)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    before = run.weights()
    momenta = {
        p: s["momentum_buffer"].clone()
        for p, s in run.optimizer.state.items()
        if s.get("momentum_buffer") is not None
    }
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.optimizer.step()
    for group, lr in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    assert same(run.weights(), before)
    for p, s in run.optimizer.state.items():
        s["momentum_buffer"] = momenta.get(p)
    run.optimizer.zero_grad()


EVENTS = [
    ask_for_gradients,
    ask_at_the_input,
    drop_the_gradient,
    zero_the_gradient,
    fail_in_backward,
    skip_a_step,
    take_a_template_step,
]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("when", [0, 2, 4])
def test_a_pass_that_leads_to_no_step_leaves_no_trace(event, when):
    runs = [Run(pw.BackMatching(measure_every=4)) for _ in range(2)]
    for step in range(8):
        if step == when:
            event(runs[0])
        assert runs[0].step(step) == runs[1].step(step)
    assert same(runs[0].weights(), runs[1].weights())


def test_gradients_at_the_input_cost_no_measurement():
    run = Run()
    ask_at_the_input(run)
    assert run.model[3].count == 1


def test_a_batch_with_nan_does_not_enter_the_values():
    run = Run(pw.BackMatching(measure_every=1))
    run.step(0)
    kept = read_kept(run.optimizer.state[run.model[0].weight])
    skip_a_step(run)
    assert read_kept(run.optimizer.state[run.model[0].weight]) == kept
