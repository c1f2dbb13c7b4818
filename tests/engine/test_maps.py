"""Every form in which a weight can be used: captured, right, and as torch has it where left alone."""

from dataclasses import replace

import pytest
import torch
from forms import FORMS, Form
from torch import Tensor, nn

import plywise as pw
from plywise import LinearCall
from plywise.engine import health

FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
LAMBDA = 0.5


def gradients(form: Form, model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of parameters and input under a loss that is not linear in the output."""
    x = form.input(dtype)
    out = model.to(torch.float32 if form.only_float32 else dtype)(x)
    out.sin().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found if x.grad is None else {**found, "input": x.grad.clone()}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


@FORM
def test_the_identity_rule_gives_autograds_gradients(form: Form) -> None:
    plain = gradients(form, form.build())
    model = form.build()
    rule = pw.Backprop().attach(model, kinds="all")
    found = gradients(form, model)
    assert found.keys() == plain.keys()
    for name, value in found.items():
        assert relative(value, plain[name]) < (1e-5 if form.only_float32 else 1e-12), name
    assert rule.explain().share >= form.handled, str(rule.explain())


@FORM
def test_outputs_and_input_gradients_are_torchs_to_the_bit(form: Form) -> None:
    plain, model = form.build().float(), form.build().float()
    pw.ProxProp().attach(model, kinds="all")
    assert torch.equal(model(form.input(torch.float32)), plain(form.input(torch.float32)))
    found, wanted = (gradients(form, net, torch.float32).get("input") for net in (model, plain))
    if found is not None and form.bits:
        assert torch.equal(found, wanted)


@FORM
def test_left_alone_is_torchs_to_the_bit(form: Form) -> None:
    # the first pass, in which calls are only found to be of a kind that is not taken, included
    plain, model = form.build(), WithUnused(form.build())
    kinds = [kind for kind in ("linear", "norm") if kind not in kinds_of(form)][:1]
    rule = pw.ProxProp().attach(model, kinds=kinds)
    found, wanted = gradients(form, model, torch.float32), gradients(form, plain, torch.float32)
    for name, value in wanted.items():
        assert torch.equal(found[name if name == "input" else f"inner.{name}"], value), name
    rule.detach()


class WithUnused(nn.Module):
    """A module beside others that a rule could take."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.linear, self.norm = inner, nn.Linear(2, 2), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def kinds_of(form: Form) -> set[str]:
    """The kinds of maps that a form calls."""
    model, seen = form.build(), set()
    rule = pw.Backprop().attach(model, kinds="all")
    with rule.observing(lambda call, update, below: seen.add(call.map.kind)):
        gradients(form, model)
    return seen


@FORM
def test_the_call_is_a_linear_map(form: Form) -> None:
    """ΔᵀA, Grams, sums and norms agree with their slow definitions."""
    model = form.build()
    calls: list[LinearCall] = []
    rule = pw.Backprop().attach(model, kinds="all")
    with rule.observing(lambda call, update, below: calls.append(call)):
        gradients(form, model)
    assert calls
    with torch.no_grad():
        for call in calls:
            check_statistics(call if call.a.dtype != torch.float32 else widen(call))


def widen(call: LinearCall) -> LinearCall:
    return replace(call, a=call.a.double(), delta=call.delta.double(), weight=call.weight.double())


def check_statistics(call: LinearCall) -> None:
    rows, delta = call.rows(torch.float64), call.delta_rows(torch.float64)
    assert rows.shape == (call.groups, call.row_count, call.columns)
    assert delta.shape == (call.groups, call.row_count, call.outputs)
    assert torch.equal(call.from_delta_rows(delta), call.delta)
    matrix = call.matrix(call.gradient())
    assert relative(matrix, delta.mT @ rows) < 1e-12
    gram = rows.mT @ rows
    assert relative(call.gram(torch.float64).tril(), gram.tril()) < 1e-12
    assert relative(call.dual_gram(torch.float64).tril(), (rows @ rows.mT).tril()) < 1e-12
    assert relative(call.square_norms(), rows.square().sum(2)) < 1e-12
    assert relative(call.trace(), rows.square().sum((1, 2))) < 1e-12
    bare = rows[:, :, : call.width]
    assert float((call.mean_row(torch.float64) - bare.mean(1)).abs().max()) < 1e-12
    centred, _ = call.map.centred_gram(call.cast_input(torch.float64))
    shifted = bare - bare.mean(1, keepdim=True)
    assert relative(centred.double().tril(), (shifted.mT @ shifted).tril()) < 1e-5
    factors = torch.rand(call.groups, call.row_count, dtype=torch.float64)
    scaled = call.map.delta_rows(call.scale_rows(factors))
    assert relative(scaled, delta * factors.unsqueeze(2)) < 1e-12


@FORM
def test_an_exact_rule_solves_the_calls_problem(form: Form) -> None:
    """ProxProp against ``G (AᵀA + λI)⁻¹`` by a dense solve of each group."""
    model = form.build()
    pairs: list[tuple[Tensor, Tensor]] = []

    def look(call: LinearCall, update: pw.Update, below: Tensor | None) -> None:
        rows, delta = call.rows(torch.float64), call.delta_rows(torch.float64)
        system = rows.mT @ rows + LAMBDA * torch.eye(call.columns, dtype=torch.float64)
        pairs.append((call.matrix(update), torch.linalg.solve(system, rows.mT @ delta).mT))

    rule = pw.ProxProp(tau=1 / LAMBDA).attach(model, kinds="all")
    with rule.observing(look):
        gradients(form, model)
    assert pairs
    for found, wanted in pairs:
        assert relative(found, wanted) < (1e-5 if form.only_float32 else 1e-10)
    assert not rule.health.counts


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

STATEFUL = {
    "Foof": lambda: pw.Foof(stats_every=1, refresh_every=1, rank=None),
    "KFAC": lambda: pw.KFAC(stats_every=1, refresh_every=1),
    "RLS": pw.RLS,
    "GradientAmplification": lambda: pw.GradientAmplification(share=1.0, every=1),
}


@pytest.mark.parametrize("name", list(STATEFUL))
@pytest.mark.parametrize("form", [f for f in FORMS if len(f.shape) > 1], ids=lambda form: form.name)
def test_rules_with_running_state_train_every_form(form: Form, name: str) -> None:
    model = form.build()
    model = nn.Sequential(model, nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.LazyLinear(2))
    model(form.input(torch.float32).detach() if not form.indices else form.input())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    rule = STATEFUL[name]()
    # a rule that alters the backward value refuses a model of which something is left alone
    refused = pytest.raises(pw.PlywiseError, match="would get a wrong gradient")
    may_refuse = name == "GradientAmplification"
    try:
        rule.attach(model, optimizer, kinds="all")
        for _ in range(3):
            optimizer.zero_grad()
            gradients(form, model, torch.float32)
            optimizer.step()
    except pw.PlywiseError:
        if not may_refuse:
            raise
        optimizer.zero_grad()
        with refused:
            gradients(form, model, torch.float32)
        return
    # the last layer has one row: its gradient's rounding may be all that a root amplifies
    assert {event for _, event in rule.health.counts} <= {health.ROUNDING}
    assert all(torch.isfinite(p).all() for p in model.parameters())
