"""Promise 12 for back-matching: what the rule leaves alone gets plain gradients, bit for bit, or it refuses.

Exact back-matching sends other values down than gradients. So a parameter below that is left to the optimizer
is refused by name, and a backward that wants no updates (of inputs, for saliency) is a plain one.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import plywise as pw
from plywise import PlywiseError


class Transformer(nn.Module):
    """Patches, a class token, an embedding of places, and a block with norms before its branches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patch = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Embedding(5, 8)
        self.norm1, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.up, self.drop, self.down = (
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Dropout(0.3),
            nn.Linear(16, 8),
        )
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.places(torch.arange(5))
        n = self.norm1(h)
        h = h + self.attention(n, n, n, need_weights=False)[0]
        h = h + self.down(self.drop(torch.relu(self.up(self.norm2(h)))))
        return self.scale * self.head(self.norm(h)[:, 0])


def make_convolutions() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(36, 8), nn.Sigmoid(), nn.Dropout(0.3), nn.Linear(8, 3),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"transformer": Transformer, "convolutions": make_convolutions}


def make_exact(model: nn.Module, **options: object) -> pw.Rule:
    return pw.BackMatching("exact").attach(model, SGD(model.parameters(), lr=0.1), **options)


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)


def compute_loss(model: nn.Module, x: Tensor | None = None) -> Tensor:
    torch.manual_seed(3)  # the same dropout
    data, y = make_batch()
    return cross_entropy(model(data if x is None else x), y)


def find_saliency(model: nn.Module, how: str) -> Tensor:
    """The gradient at the input, asked for in several ways."""
    x = make_batch()[0].requires_grad_()
    loss = compute_loss(model, x)
    if how == "autograd.grad":
        return torch.autograd.grad(loss, x)[0]
    if how == "backward(inputs=)":
        loss.backward(inputs=[x])
    elif how == "frozen":
        loss.backward()
    elif how == "create_graph":
        return torch.autograd.grad(loss, x, create_graph=True)[0].detach()
    return x.grad


@pytest.mark.parametrize("how", ["autograd.grad", "backward(inputs=)", "frozen", "create_graph"])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_at_the_input_are_plain(name, is_training, how):
    """Fault 1d: in ``eval()`` they were falsified."""
    found = []
    for is_attached in (False, True):
        model = MODELS[name]()
        if how == "frozen":
            model.requires_grad_(False)
        if is_attached:
            make_exact(model)
        model.train(is_training)
        found.append(find_saliency(model, how))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_at_a_hidden_layer_are_plain(name):
    found = []
    for is_attached in (False, True):
        model, kept = MODELS[name](), []
        if is_attached:
            make_exact(model)
        first = next(model.children())
        handle = first.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        found.append(torch.autograd.grad(compute_loss(model), kept[0])[0])
        handle.remove()
    assert torch.equal(*found)


def test_a_pass_that_wants_updates_has_altered_values():
    """Also at the input, and below layers that are frozen."""
    found = []
    for rule, frozen in ((None, ""), ("exact", ""), ("exact", "9")):
        model = make_convolutions()
        if rule is not None:
            make_exact(model)
        if frozen:
            model.get_submodule(frozen).requires_grad_(False)
        x = make_batch()[0].requires_grad_()
        compute_loss(model, x).backward()
        found.append((x.grad, model[0].weight.grad))
    assert not torch.allclose(found[0][0], found[1][0], rtol=0.5)
    assert torch.equal(found[1][0], found[2][0])
    assert torch.equal(found[1][1], found[2][1])


def test_a_pause_is_plain():
    found = []
    for is_attached in (False, True):
        model = make_convolutions()
        with make_exact(model).paused() if is_attached else nullcontext():
            compute_loss(model).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_penalty_on_the_gradient_at_the_input_is_plain():
    found = []
    for is_attached in (False, True):
        model = make_convolutions().double()
        if is_attached:
            make_exact(model)
        x = make_batch()[0].double().requires_grad_()
        torch.manual_seed(3)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        found.append((slope.detach(), torch.autograd.grad(slope.square().sum(), x)[0]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-10)


# ---- parameters that are left to the optimizer -----------------------------------------------------


def test_a_class_token_is_refused_by_name():
    model = Transformer()
    make_exact(model)
    with pytest.raises(PlywiseError, match="'token', which it leaves to the optimizer") as caught:
        compute_loss(model).backward()
    assert caught.value.page.endswith("#altered-gradient")


@pytest.mark.parametrize("layer", ["norm1", "norm2", "norm", "places", "patch"])
def test_layers_that_are_excluded_are_refused_by_name(layer):
    model = Transformer()
    model.token.requires_grad_(False)
    make_exact(model, exclude=layer)
    with pytest.raises(PlywiseError, match=f"'{layer}.(weight|bias)', which it leaves to the optimizer"):
        compute_loss(model).backward()


@pytest.mark.parametrize("asked", ["token", "norm2.weight"])
def test_refused_where_gradients_do_not_arrive_in_grad(asked):
    """`torch.autograd.grad` skips the hooks of parameters."""
    model = Transformer()
    make_exact(model, exclude="norm2")
    with pytest.raises(PlywiseError, match=f"'{asked}', which it leaves to the optimizer"):
        torch.autograd.grad(compute_loss(model), [model.head.weight, model.get_parameter(asked)])


def test_asked_for_alone_they_are_plain():
    found = []
    for is_attached in (False, True):
        model = Transformer()
        if is_attached:
            make_exact(model, exclude="norm2")
        asked = [model.token, model.norm2.weight, model.scale]
        found.append(torch.autograd.grad(compute_loss(model), asked))
    assert all(map(torch.equal, *found))


def test_parameters_above_are_plain():
    found = []
    for is_attached in (False, True):
        model = Transformer()
        model.token.requires_grad_(False)
        if is_attached:
            make_exact(model)
        compute_loss(model).backward()
        found.append(model.scale.grad)
    assert torch.equal(*found)


def test_norms_and_embeddings_are_taken_and_train():
    model = Transformer()
    model.token.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    rule = pw.BackMatching("exact").attach(model, optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = compute_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    rows = {row.name: row for row in rule.explain().rows}
    assert all(
        rows[name].handled for name in ("patch", "places", "norm1", "norm2", "norm", "up", "down", "head")
    )


LEFT = {
    "transformer": ["token", "scale", "places.weight", "norm1.weight", "norm1.bias", "norm.weight"],
    "convolutions": ["1.weight", "1.bias"],
}


@pytest.mark.parametrize("name", list(MODELS))
def test_in_rate_mode_all_that_is_left_alone_is_plain(name):
    """In passes that measure and in others; norms are taken, so some are excluded."""
    plain, model = MODELS[name](), MODELS[name]()
    optimizer = SGD(model.parameters(), lr=0.0)
    excluded = {n.partition(".")[0] for n in LEFT[name]} - {"token", "scale", "places"}
    pw.BackMatching(measure_every=2).attach(model, optimizer, exclude=excluded)
    for _ in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        ours, theirs = (make_batch()[0].requires_grad_() for _ in range(2))
        compute_loss(model, ours).backward()
        compute_loss(plain, theirs).backward()
        optimizer.step()
        assert torch.equal(ours.grad, theirs.grad)
        for n in LEFT[name]:
            assert torch.equal(model.get_parameter(n).grad, plain.get_parameter(n).grad), n


@pytest.mark.parametrize(
    ("options", "name", "advice"),
    [
        ({}, "token", "no option of attach"),
        ({"exclude": "norm2"}, "norm2.weight", "layers= or exclude="),
        ({"kinds": ("linear", "conv")}, "norm2.weight", "kinds='all'"),
    ],
)
def test_the_refusal_says_what_helps(options, name, advice):
    """No kind of map helps a class token: it is added, not multiplied with an input."""
    model = Transformer()
    if name != "token":
        model.token.requires_grad_(False)
        model.places.requires_grad_(False)
    make_exact(model, **options)
    with pytest.raises(PlywiseError, match=f"'{name}'") as caught:
        torch.autograd.grad(compute_loss(model), [model.head.weight, model.get_parameter(name)])
    said = str(caught.value)
    assert "freeze that parameter" in said
    assert "use a rule that leaves gradients as they are" in said
    for words in ("no option of attach", "layers= or exclude=", "kinds='all'"):
        assert (words in said) == (words == advice)
