"""Every way of saving an optimizer carries the statistics bit for bit, or says by name that it does not."""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from state_runs import OPTIMIZERS, RULES, Run, Stacked, Transposed, start_run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from plywise import BackMatching, Foof, StateError, recommend
from plywise.testing.contract.models import have_same_bits

AFTER = range(4, 9)
"""The steps after the load: layers of a cycle of two or three steps take their turns in each of them."""

Road = Callable[[Run, Run, Path], None]


# ---- the roads: from one run to another ----------------------------------------------------------------


def through_plain_files(run: Run, other: Run, folder: Path) -> None:
    torch.save([run.model.state_dict(), run.optimizer.state_dict()], folder / "state.pt")
    model, optimizer = torch.load(folder / "state.pt", weights_only=True)
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)


def through_torchs_state_dicts(**settings: bool) -> Road:
    options = StateDictOptions(**settings)

    def road(run: Run, other: Run, folder: Path) -> None:
        model, optimizer = copy.deepcopy(get_state_dict(run.model, run.optimizer, options=options))
        put(other, {"model": model, "optimizer": optimizer}, options)

    return road


def through_distributed_checkpoints(**settings: bool) -> Road:
    options = StateDictOptions(**settings)

    def road(run: Run, other: Run, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one process
            dcp.save(take(run, options), checkpoint_id=folder / "distributed")
            state = take(other, options)
            dcp.load(state, checkpoint_id=folder / "distributed")
        put(other, state, options)

    return road


def take(run: Run, options: StateDictOptions) -> dict[str, Any]:
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}


def put(run: Run, state: dict[str, Any], options: StateDictOptions | None = None) -> None:
    model, optimizer = state["model"], state["optimizer"]
    set_state_dict(
        run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options
    )


ROADS: dict[str, Road] = {
    "files": through_plain_files,
    "nested": through_torchs_state_dicts(),
    "nested full": through_torchs_state_dicts(full_state_dict=True, cpu_offload=True),
    "flattened": through_torchs_state_dicts(flatten_optimizer_state_dict=True),
    "distributed": through_distributed_checkpoints(),
    "distributed flattened": through_distributed_checkpoints(flatten_optimizer_state_dict=True),
}
IN_PLACE = ("nested full", "flattened", "distributed", "distributed flattened")
"""Roads on which torch loads only what it finds in the optimizer."""

PAIRS = [
    *((rule, "momentum") for rule in RULES),
    ("recommended", "its own"),
    ("back_matching-mean", "sgd"),
    *(("foof", name) for name in OPTIMIZERS if name != "momentum"),
]


@pytest.mark.parametrize(("rule", "optimizer"), PAIRS)
def test_new_runs_go_on_from_the_saved_one(rule: str, optimizer: str, tmp_path: Path) -> None:
    run, others = start_run(rule, optimizer).steps(0, 1, 2, 3), {}
    for road in ROADS:
        if optimizer == "sgd" and road == "nested full":
            continue  # torch cannot load such a state dict without any tensors
        others[road] = start_run(rule, optimizer, seed=9)
        if road in IN_PLACE:
            others[road].compute_loss(0)  # shows the calls that nothing says beforehand
        (folder := tmp_path / road).mkdir()
        ROADS[road](run, others[road], folder)
        assert have_same_bits(run.copy_state(), others[road].copy_state()), road
    for number in AFTER:
        run.step(number)
        for road, other in others.items():
            other.step(number)
            assert have_same_bits(run.copy_state(), other.copy_state()), (road, number)


@pytest.mark.parametrize("steps", [1, 3])  # after one step, a count of rows is the number of rows
@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("road", ["files", "nested", "distributed"])
def test_after_any_step(after: int, road: str, steps: int, tmp_path: Path) -> None:
    run = Run(RULES["foof"](), OPTIMIZERS["momentum"]).steps(*range(after))
    other = Run(RULES["foof"](), OPTIMIZERS["momentum"], seed=9).steps(*range(7, 7 + steps))
    other.optimizer.zero_grad()
    if road == "distributed" and after == 0:
        run.compute_loss(0)  # the layers' calls are known, as they are in the other run
    ROADS[road](run, other, tmp_path)
    for number in range(after, after + 5):
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state()), number


@pytest.mark.parametrize("road", IN_PLACE)
@pytest.mark.parametrize("rule", ["foof", "back_matching-mean", "recommended"])
def test_what_does_not_arrive_is_refused(rule: str, road: str, tmp_path: Path) -> None:
    # torch loads in place: a weight whose calls are not known yet has no place
    run = start_run(rule, "momentum").steps(0, 1)
    other = start_run(rule, "momentum", seed=9)
    words = (
        r"Run one forward pass|Take one training step|Missing key.*plywise\.|(late.weight|scale).plywise\."
    )
    with pytest.raises(
        (StateError, dcp.CheckpointException, KeyError), match=words
    ):  # the last two are torch's
        ROADS[road](run, other, tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("flat", [False, True])
def test_asking_for_a_checkpoint_changes_nothing(optimizer: str, flat: bool) -> None:
    # torch takes a step with zero gradients, to see what the optimizer's state will be
    ends = []
    for asks in (False, True):
        run = Run(RULES["foof"](), OPTIMIZERS[optimizer])
        for number in range(7):
            if asks:
                get_state_dict(
                    run.model, run.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat)
                )
                run.optimizer.state_dict()
            run.step(number)
        ends.append(run.copy_state())
    assert have_same_bits(*ends)
    assert int(ends[0]["Foof/step"]) == 7


def test_a_step_without_evidence_changes_nothing() -> None:
    run, plain = (Run(RULES["foof"](), OPTIMIZERS["sgd"]) for _ in range(2))
    for number in range(6):
        run.optimizer.zero_grad(set_to_none=False)
        run.optimizer.step()
        before = run.copy_state()
        run.optimizer.step()
        assert have_same_bits(run.copy_state(), before)
        run.step(number)
        plain.step(number)
        assert have_same_bits(run.copy_state(), plain.copy_state())


def test_one_rule_cannot_go_on_from_another() -> None:
    run = Run(RULES["foof"](), OPTIMIZERS["momentum"]).steps(0, 1)
    states = [run.optimizer.state_dict(), take(run, StateDictOptions())["optimizer"]]
    other = Run(RULES["rls"](), OPTIMIZERS["momentum"]).steps(0)
    before = other.copy_state()
    for state in copy.deepcopy(states[:1]):
        with pytest.raises(StateError, match="saved with Foof, and the rule attached is RLS"):
            other.optimizer.load_state_dict(state)
    with pytest.raises(StateError, match="saved with Foof, and the rule attached is RLS"):
        put(other, {"model": run.model.state_dict(), "optimizer": copy.deepcopy(states[1])})
    assert have_same_bits(
        {k: v for k, v in other.copy_memory().items() if "/" in k},
        {k: before[k] for k in other.copy_memory()},
    )


def test_statistics_of_a_rule_that_is_not_attached_are_refused() -> None:
    def attach(run: Run) -> Run:
        Foof(stats_every=1, refresh_every=1).attach(run.model, run.optimizer, layers="first")
        run.rule.attach(run.model, run.optimizer, exclude="first")
        return run

    run = attach(Run(RULES["rls"](), OPTIMIZERS["momentum"], attach=False)).steps(0, 1)
    state = copy.deepcopy(run.optimizer.state_dict())
    attach(Run(RULES["rls"](), OPTIMIZERS["momentum"], attach=False)).optimizer.load_state_dict(state)
    alone = Run(RULES["rls"](), OPTIMIZERS["momentum"])
    with pytest.raises(
        StateError, match="statistics of Foof besides those of RLS, and no such rule is attached"
    ):
        alone.optimizer.load_state_dict(state)


def test_back_matching_beside_a_rule_with_statistics(tmp_path: Path) -> None:
    def start(seed: int) -> Run:
        run = Run(RULES["foof"](), OPTIMIZERS["sgd"], seed, attach=False)
        run.rule.attach(run.model, run.optimizer, layers="first")
        BackMatching().attach(run.model, run.optimizer, exclude="first")
        return run

    run, other = start(1).steps(0, 1), start(9)
    through_torchs_state_dicts()(run, other, tmp_path)
    assert have_same_bits(run.steps(2, 3).copy_state(), other.steps(2, 3).copy_state())


def test_values_belong_to_parts_of_a_weight_whichever_is_called_first(tmp_path: Path) -> None:
    run, other = (Run(BackMatching(), OPTIMIZERS["adam"], model=Stacked(seed)) for seed in (1, 9))
    through_plain_files(run.steps(0, 1), other, tmp_path)
    for one in (run, other):
        one.step(2, turned=True)
    assert have_same_bits(run.copy_state(), other.copy_state())


@pytest.mark.parametrize("after", [2, 3])
def test_bits_do_not_depend_on_the_order_in_which_layers_are_found(after: int, tmp_path: Path) -> None:
    # the head is known at attach, and the layers before it by their calls, after the load
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList(Transposed(size, 8) for size in (6, 8))
            self.right = nn.ParameterList(torch.randn(8, size) / 3 for size in (6, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for left, right in zip(self.left, self.right, strict=True):
                x = torch.tanh(left(x) + nn.functional.linear(x, right))
            return self.head(x)

    def start(seed: int) -> Run:
        torch.manual_seed(seed)
        run = Run(RULES["nlms"](), OPTIMIZERS["sgd"], model=Pairs(), attach=False)
        run.optimizer, run.rule = recommend(run.model, lr=0.01, budget=math.inf)
        return run

    run, other = start(1).steps(*range(after)), start(9)
    through_plain_files(run, other, tmp_path)
    for number in AFTER:
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state()), number


def test_values_of_several_calls_that_do_not_arrive_are_refused(tmp_path: Path) -> None:
    class Repeating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    run, other = (Run(BackMatching(), OPTIMIZERS["adam"], model=Repeating()) for _ in range(2))
    road = ROADS["distributed flattened"]
    with pytest.raises(StateError, match=r"measured at 'layer.weight' were saved, but not all have arrived"):
        road(run.steps(0, 1), other, tmp_path)
    road(run, other.steps(7), tmp_path)  # the way that the message names
    for one in (run, other):
        one.steps(2, 3)
    assert have_same_bits(run.copy_state(), other.copy_state())


@pytest.mark.parametrize("flat", [False, True])
def test_a_state_saved_without_the_rule_is_refused(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    plain = Run(RULES["foof"](), OPTIMIZERS["momentum"], attach=False).steps(0, 1)
    run = Run(RULES["foof"](), OPTIMIZERS["momentum"])
    with pytest.raises(StateError, match="holds no memory of Foof: it was saved without the rule"):
        put(run, copy.deepcopy(take(plain, options)), options)


def test_fewer_layers_than_were_saved_are_refused() -> None:
    run = Run(RULES["foof"](), OPTIMIZERS["momentum"]).steps(0, 1)
    other = Run(RULES["foof"](), OPTIMIZERS["momentum"], attach=False)
    other.rule.attach(other.model, other.optimizer, exclude=["late", "head"])
    with pytest.raises(
        StateError, match=r"statistics of Foof for 2 parameters \(of shapes \(8, 8\), \(3, 8\)\)"
    ):
        other.optimizer.load_state_dict(run.optimizer.state_dict())


# ---- load, then attach ---------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ["files", "nested"])
@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [*(("adabk", name) for name in OPTIMIZERS), ("back_matching-mean", "sgd"), ("recommended", "its own")],
)
def test_loaded_before_attach(rule: str, optimizer: str, road: str, tmp_path: Path) -> None:
    run = start_run(rule, optimizer).steps(0, 1, 2, 3)
    other = start_run(rule, optimizer, seed=9, attach=False)
    ROADS[road](run, other, tmp_path)
    other.attach()
    for number in AFTER:
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state()), number


@pytest.mark.filterwarnings("ignore:The optimizer has been used or loaded")  # SGD has no state
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loaded_before_attach_and_before_the_first_step(optimizer: str, tmp_path: Path) -> None:
    run = Run(RULES["foof"](), OPTIMIZERS[optimizer])
    other = Run(RULES["foof"](), OPTIMIZERS[optimizer], seed=9, attach=False)
    through_plain_files(run, other, tmp_path)
    for one in (run, other.attach()):
        one.steps(0, 1)
    assert have_same_bits(run.copy_state(), other.copy_state())


def test_loaded_before_attach_in_half_precision_is_refused(tmp_path: Path) -> None:
    # torch casts what it loads to the parameter's dtype
    run = Run(RULES["foof"](), OPTIMIZERS["momentum"])
    run.model.bfloat16()
    run.steps(0, 1)
    other = Run(RULES["foof"](), OPTIMIZERS["momentum"], seed=9, attach=False)
    other.model.bfloat16()
    through_plain_files(run, other, tmp_path)
    with pytest.raises(
        StateError, match=r"layer 'first' were loaded before attach\(\), and torch has rounded them"
    ):
        other.attach()
    other.optimizer.state.clear()
    other.attach()  # and in this order they load
    through_plain_files(run, other, tmp_path)
    for one in (run, other):
        one.steps(2, 3, 4)
    assert have_same_bits(run.copy_state(), other.copy_state())


@pytest.mark.parametrize(
    ("rule", "optimizer", "road", "what"),
    [
        ("foof", "momentum", "flattened", "statistics of Foof"),
        ("foof", "momentum", "distributed", "statistics of Foof"),
        ("foof", "sgd", "flattened", "statistics of Foof"),
        ("foof", "sgd", "distributed", "statistics of Foof"),  # nothing in the optimizer's state shows it
        ("rls", "sgd", "distributed", "statistics of RLS"),
        ("back_matching-mean", "sgd", "distributed", "values measured by back-matching"),
        ("back_matching-mean", "adam", "distributed", "values measured by back-matching"),
        ("recommended", "its own", "distributed", "statistics of Coordinates"),
    ],
)
def test_loaded_in_place_before_attach_is_noticed(
    rule: str, optimizer: str, road: str, what: str, tmp_path: Path
) -> None:
    # torch has thrown the statistics away, since it found no place for them
    run = start_run(rule, optimizer).steps(0, 1)
    other = start_run(rule, optimizer, seed=9, attach=False)
    ROADS[road](run, other, tmp_path)
    with pytest.warns(RuntimeWarning, match=f"no {what}: they begin from nothing.*attach the rule first"):
        other.attach()
    other.rule.detach()
    other.attach()  # a user who has detached a rule knows


def test_another_rules_statistics_are_refused_at_attach(tmp_path: Path) -> None:
    run = Run(RULES["foof"](), OPTIMIZERS["momentum"]).steps(0, 1)
    other = Run(RULES["rls"](), OPTIMIZERS["momentum"], attach=False)
    through_plain_files(run, other, tmp_path)
    with pytest.raises(
        StateError, match="holds statistics of Foof for layer 'first', and the rule attached is RLS"
    ):
        other.attach()
    assert not other.model._forward_hooks
    other.optimizer.state.clear()
    other.attach().steps(0, 1)


def test_other_settings_are_refused_at_attach(tmp_path: Path) -> None:
    run = Run(Foof(rank=None), OPTIMIZERS["momentum"]).steps(0, 1)
    other = Run(Foof(rank=2), OPTIMIZERS["momentum"], attach=False)
    through_plain_files(run, other, tmp_path)
    with pytest.raises(StateError, match=r"layer 'first' does not fit.*other settings"):
        other.attach()


def test_statistics_of_nobody_are_refused_at_the_first_step(tmp_path: Path) -> None:
    run = Run(RULES["foof"](), OPTIMIZERS["momentum"]).steps(0, 1)
    other = Run(RULES["foof"](), OPTIMIZERS["momentum"], attach=False)
    through_plain_files(run, other, tmp_path)
    other.rule.attach(other.model, other.optimizer, layers="first")
    with pytest.raises(StateError, match=r"statistics of Foof for .* that no attached Foof handles"):
        other.step(2)


def test_an_optimizer_that_begins_its_state_when_it_is_made_has_lost_nothing(
    recwarn: pytest.WarningsRecorder,
) -> None:
    Run(RULES["foof"](), lambda parameters: torch.optim.Adagrad(parameters, lr=0.01)).steps(0, 1)
    assert not [str(warning.message) for warning in recwarn if "begin from nothing" in str(warning.message)]
