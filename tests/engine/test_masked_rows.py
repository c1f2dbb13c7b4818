"""`plywise.rows`: padded positions and ignored targets do not change how a rule moves."""

import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import plywise as pw
from plywise.data.models import call_model
from plywise.engine.capture.masked_rows import LEFT_OUT
from plywise.registry.names import RULE, list_names

WORDS, WIDTH, CLASSES = 11, 8, 3
PADDING = 30
RULES = {
    **{name: getattr(pw, name) for name in list_names(RULE)},
    "ProxProp of the mean": lambda: pw.ProxProp(gram="mean"),
    "ProxProp by cg": lambda: pw.ProxProp(solver="cg"),
    "Consequentialism, centred": lambda: pw.Consequentialism(bias="centre"),
    "BackMatching, exact": lambda: pw.BackMatching(mode="exact"),
    "Foof of every position": lambda: pw.Foof(sample=1),
    "Foof, gathering seldom": lambda: pw.Foof(stats_every=2, refresh_every=2),
}


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tagger(nn.Module):
    """A transformer that tags words; padded positions are neither attended to nor in the loss."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.words = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids, mask):
        x = self.words(ids if self.batch_first else ids.t())
        x = self.head(self.encoder(x, src_key_padding_mask=~mask))
        return x if self.batch_first else x.transpose(0, 1)


def make_batch(samples=6, positions=6, padding=0, is_ragged=False):
    torch.manual_seed(3)
    ids, y = torch.randint(WORDS, (samples, positions)), torch.randint(CLASSES, (samples, positions))
    mask = torch.ones(samples, positions, dtype=torch.bool)
    if is_ragged:
        mask[2, 3:] = False
        mask[4, 1:] = False
    pad = lambda t: F.pad(t, (0, padding))  # noqa: E731
    return pad(ids), pad(y), pad(mask)


def train(make_rule, batch, use_mask, steps=3, batch_first=True, rate=0.01):
    """The updates of the last step, and the rule."""
    ids, y, mask = batch
    torch.manual_seed(1)
    model = Tagger(batch_first)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    rule = make_rule()
    rule.attach(model, optimizer, kinds=None if rule.remembers else "all")
    for _ in range(steps):
        optimizer.zero_grad()
        of_positions = mask if batch_first else mask.t()
        with pw.rows(of_positions) if use_mask else nullcontext():
            output = model(ids, mask)
        F.cross_entropy(output[mask], y[mask]).backward()
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters()}, rule


def find_distance(found, wanted):
    """The largest difference, relative to the largest entry of a parameter's update."""
    return max(
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(1e-9))
        for name in wanted
    )


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_padding_and_a_mask_are_as_no_padding(name, steps):
    plain, _ = train(RULES[name], make_batch(), False, steps)
    padded, rule = train(RULES[name], make_batch(padding=PADDING), True, steps)
    assert find_distance(padded, plain) < 1e-6
    assert not rule.health.counts


@pytest.mark.parametrize("name", ["ProxProp", "Foof", "NLMS"])
def test_without_a_mask_padding_changes_the_move(name):
    plain, _ = train(RULES[name], make_batch(), False)
    padded, _ = train(RULES[name], make_batch(padding=PADDING), False)
    assert find_distance(padded, plain) > 0.05


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["ProxProp", "Foof", "BackMatching, exact"])
def test_ragged_samples_and_either_order_of_dimensions(name, batch_first):
    """As many positions as samples: shapes do not say which is which, inside attention neither."""
    first, _ = train(RULES[name], make_batch(is_ragged=True), True, batch_first=batch_first)
    more = make_batch(is_ragged=True, padding=PADDING)
    second, _ = train(RULES[name], more, True, batch_first=batch_first)
    assert find_distance(second, first) < 1e-6


def update_of(x, delta_weight, mask=None, layers=None, model=None, rule=None):
    """The update of one linear layer, whose loss is linear in its output."""
    torch.manual_seed(0)
    model = nn.Linear(x.shape[-1], 2) if model is None else model
    rule = (rule or pw.ProxProp()).attach(model)
    if mask is None:
        output = model(x)
    else:
        with pw.rows(mask, layers=layers):
            output = model(x)
    (output * delta_weight).sum().backward()
    return model.weight.grad, rule


def test_rows_that_are_left_out_might_as_well_not_be_there():
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.4
    weight = torch.randn(4, 5, 2) * mask.unsqueeze(2)
    slow, _ = update_of(x[mask], weight[mask])
    masked, rule = update_of(x, weight, mask)
    assert torch.allclose(masked, slow, atol=1e-12)
    flat, _ = update_of(x.flatten(0, 1), weight.flatten(0, 1), mask)
    assert torch.allclose(flat, slow, atol=1e-12)
    assert not torch.allclose(update_of(x, weight)[0], slow, atol=1e-3)
    assert not rule.health.counts


def test_samples_are_left_out_of_a_convolution():
    torch.manual_seed(0)
    x, keep = torch.randn(5, 2, 6, 6), torch.tensor([True, False, True, True, False])
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    updates = []
    for inputs, mask in ((x[keep], None), (x, keep)):
        rule = pw.Consequentialism().attach(model)
        model.zero_grad()
        with pw.rows(torch.ones(len(inputs)) if mask is None else mask):
            output = model(inputs)
        (output if mask is None else output[mask]).square().mean().backward()
        updates.append([p.grad.clone() for p in model.parameters()])
        rule.detach()
    for plain, masked in zip(*updates, strict=True):
        assert torch.allclose(plain, masked, atol=1e-10)


def test_the_innermost_mask_that_fits_is_taken():
    x, weight = torch.randn(4, 3), torch.randn(4, 2)
    outer, inner = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    rule = pw.ProxProp().attach(model)
    with pw.rows(outer):
        with pw.rows(inner), pw.rows(torch.ones(7, 2)), pw.rows(outer, layers="other.*"):
            first = model(x)
        second = model(x)
    with pytest.warns(RuntimeWarning, match="rows that plywise.rows leaves out"):
        (first * weight).sum().backward()
    assert torch.allclose(model.weight.grad, update_of(x[1:], weight[1:])[0], atol=1e-12)
    model.zero_grad()
    (second * weight).sum().backward()
    kept = outer.bool()
    assert torch.allclose(model.weight.grad, update_of(x[kept], weight[kept])[0], atol=1e-12)
    rule.detach()


def test_a_mask_of_ignored_targets_is_for_the_layers_that_are_named():
    """Other positions reach the loss through attention: their rows count below."""
    ids, y, mask = make_batch()
    told = torch.rand(y.shape) > 0.5
    updates = {}
    for layers in ("head", None):
        torch.manual_seed(1)
        model = Tagger()
        rule = pw.ProxProp().attach(model)
        with pw.rows(told, layers=layers):
            output = model(ids, mask)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            F.cross_entropy(output[told], y[told]).backward()
        updates[layers] = {name: p.grad for name, p in model.named_parameters()}
        assert bool(said) == bool(rule.health.total(LEFT_OUT)) == (layers is None)
        rule.detach()
    head = {"head.weight": updates[None]["head.weight"]}
    assert find_distance(updates["head"], head) < 1e-12
    assert find_distance(updates["head"], updates[None]) > 0.01


def test_a_rule_with_memory_keeps_the_gradient_of_rows_that_are_left_out():
    x, weight = torch.randn(4, 3), torch.randn(4, 2)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pw.Foof(damping=1e9).attach(model, optimizer)  # as good as the plain direction
    with pw.rows(torch.tensor([True, False, True, True])):
        output = model(x)
    (output * weight).sum().backward()
    optimizer.step()
    plain = weight.t() @ x
    assert torch.allclose(model.weight.grad, plain, rtol=1e-6)


def test_masks_of_a_source_and_a_target_are_told_by_their_shapes():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    target, source = torch.randn(3, 4, WIDTH), torch.randn(3, 5, WIDTH)
    updates = []
    for padding in (0, 7):
        queries, keys = (F.pad(t, (0, 0, 0, padding)) for t in (target, source))
        of_target = F.pad(torch.ones(3, 4, dtype=torch.bool), (0, padding))
        of_source = F.pad(torch.ones(3, 5, dtype=torch.bool), (0, padding))
        rule = pw.ProxProp().attach(model)
        model.zero_grad()
        with pw.rows(of_source), pw.rows(of_target):
            output, _ = model(queries, keys, keys, key_padding_mask=~of_source)
        output[of_target].square().mean().backward()
        updates.append({name: p.grad.clone() for name, p in model.named_parameters()})
        rule.detach()
    assert find_distance(updates[1], updates[0]) < 1e-6


def test_a_checkpoint_remembers_the_mask():
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.4
    weight = torch.randn(4, 5, 2) * mask.unsqueeze(2)
    wanted, _ = update_of(x, weight, mask)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    pw.ProxProp().attach(model)
    with pw.rows(mask):
        output = checkpoint(model, x, use_reentrant=False)
    (output * weight).sum().backward()
    assert torch.allclose(model.weight.grad, wanted, atol=1e-12)


def test_other_threads_and_what_comes_after_see_no_mask():
    x, weight, mask = torch.randn(4, 3), torch.randn(4, 2), torch.tensor([1, 0, 1, 1])
    plain, _ = update_of(x, weight)
    found = []

    def fail_within():
        with pw.rows(mask):
            thread = threading.Thread(target=lambda: found.append(update_of(x, weight)[0]))
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert torch.equal(found[0], plain)
    assert torch.equal(update_of(x, weight)[0], plain)


def test_nothing_counts():
    x, weight = torch.randn(4, 3), torch.zeros(4, 2)
    update, _ = update_of(x, weight, torch.zeros(4))
    assert torch.equal(update, torch.zeros_like(update))


def test_explain_says_how_many_rows_counted():
    x, mask, model = torch.randn(4, 5, 3), torch.arange(20).view(4, 5) < 7, nn.Linear(3, 2)
    _, rule = update_of(x, torch.zeros(4, 5, 2), mask, model=model)
    assert rule.explain().rows[0].reason == "linear in its weights; 7 of 20 rows counted in its last call"
    model(x).sum().backward()
    assert rule.explain().rows[0].reason == "linear in its weights"


def test_a_mask_has_a_dimension():
    with pytest.raises(pw.PlywiseError, match=r"of shape \(N,\), \(N, T\)"), pw.rows(torch.tensor(True)):
        pass


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"mask": torch.ones(5)}, 1),
        ({"mask": torch.ones(12), "layers": "haed"}, 1),
        ({"mask": torch.ones(12)}, 0),
        ({"mask": torch.ones(12), "layers": "2"}, 0),
    ],
    ids=["shape", "name", "all layers", "one layer"],
)
def test_masks_that_no_layer_uses_are_said_once(given, count):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    rule = pw.ProxProp().attach(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(8):
            with pw.rows(**given):
                loss = model(torch.randn(12, 4)).square().mean()
            loss.backward()
    said = [str(one.message) for one in seen if "No layer has used the masks" in str(one.message)]
    assert len(said) == count
    assert all(str(tuple(given["mask"].shape)) in one and "(12, 2)" in one for one in said)
    rule.detach()


def test_a_mask_of_a_batch_need_not_fit_a_layer():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, words, attention_mask):
            return self.head((self.words(words) * attention_mask[..., None]).sum(1))

    model = Bag()
    rule = pw.ProxProp().attach(model)
    batch = {"words": torch.randint(9, (6, 5)), "attention_mask": torch.ones(6, 5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            call_model(model, batch).square().mean().backward()
    rule.detach()
