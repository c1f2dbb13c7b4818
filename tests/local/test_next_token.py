"""Local next-token learning: each block follows its own cross-entropy, and one block's memory is enough."""

import copy

import pytest
import torch
from alive import most_alive
from moves import Recorded, backprop, relative, same_bits
from torch import nn
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.arena.workloads.networks import CharTransformer, TransformerBlock
from plywise.local.next_token import linear_head, mlp_head

V, T, WIDTH = 7, 6, 8


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, WIDTH)
        self.places = nn.Parameter(torch.randn(T, WIDTH) / 10)

    def forward(self, x):
        return self.tokens(x) + self.places[: x.shape[1]]


def transformer(depth=3):
    """Blocks of a transformer in float64; the first one embeds."""
    first = nn.Sequential(Embed(), TransformerBlock(WIDTH, 2))
    return [block.double() for block in (first, *(TransformerBlock(WIDTH, 2) for _ in range(depth - 1)))]


def tokens(rows=5, number=0):
    x = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(number))
    return x[:, :-1], x[:, 1:]


def nats(scores, y):
    return cross_entropy(scores.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("make_head", [linear_head, mlp_head])
def test_each_block_and_its_head_follow_their_own_cross_entropy(make_head):
    modules, heads, (x, y), recorded = transformer(), [], tokens(), Recorded()

    def kept(width, scores):
        heads.append(make_head(width, scores).double())
        return heads[-1]

    learner = pw.LocalNextToken(pw.Blocks(modules, x), V, head=kept, optimizer=recorded)
    s, wanted, losses = x, [], []
    for block, head in zip(modules, heads, strict=True):
        s = block(s.detach())
        losses.append(nats(head(s), y))
        wanted += torch.autograd.grad(losses[-1], [*block.parameters(), *head.parameters()])
    torch.testing.assert_close(learner.step(x, y), torch.stack(losses).detach(), rtol=1e-12, atol=0)
    pairs = [module for pair in zip(modules, heads, strict=True) for module in pair]
    assert relative(recorded.of(pairs), wanted) < 1e-12


def test_tied_heads_read_with_the_embedding_which_learns_in_the_first_block_alone():
    modules, (x, y), recorded = transformer(), tokens(), Recorded()
    table = modules[0][0].tokens
    learner = pw.LocalNextToken(pw.Blocks(modules, x), V, tied=table, optimizer=recorded)
    norms = [trainer.component.readout.head for trainer in learner.trainers]
    s, wanted = x, []
    for number, (block, norm) in enumerate(zip(modules, norms, strict=True)):
        s = block(s.detach())
        weight = table.weight if number == 0 else table.weight.detach()
        wanted += torch.autograd.grad(nats(norm(s) @ weight.T, y), [*block.parameters(), *norm.parameters()])
    before = copy.deepcopy(learner.as_module())
    learner.step(x, y)
    pairs = [module for pair in zip(modules, norms, strict=True) for module in pair]
    assert relative(recorded.of(pairs), wanted) < 1e-12
    assert before(x).shape == (5, T, V)
    moved = learner.as_module()
    torch.testing.assert_close(moved(x), norms[-1](nn.Sequential(*modules)(x)) @ table.weight.T)


def test_one_block_is_backpropagation():
    """Whose last layer makes the scores, so that there is no head."""
    network, (x, y) = (
        [nn.Sequential(*transformer(2), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, V)).double()],
        tokens(),
    )
    wanted, recorded = backprop(network, nats, x, y), Recorded()
    pw.LocalNextToken(pw.Blocks(network, x), V, optimizer=recorded).step(x, y)
    assert relative(recorded.of(network), wanted) < 1e-12


@pytest.mark.parametrize("pieces", [2, 5, 50])
def test_pieces_change_no_gradient(pieces):
    found = []
    for count in (1, pieces):
        torch.manual_seed(0)
        modules, (x, y), recorded = transformer(), tokens(), Recorded()
        pw.LocalNextToken(pw.Blocks(modules, x), V, pieces=count, optimizer=recorded).step(x, y)
        found.append(recorded.of(modules))
    assert relative(*found) < 1e-12


class First(nn.Module):
    """The embedding and the first block of a whole model."""

    def __init__(self, model):
        super().__init__()
        self.characters, self.places, self.block = model.characters, model.places, model.blocks[0]

    def forward(self, x):
        return self.block(self.characters(x) + self.places.weight)


def memories(depth):
    """The most bytes alive in a step of block-local learning, and of backpropagation."""
    torch.manual_seed(0)
    model, x = CharTransformer(65, 32, 32, depth, 4), torch.randint(65, (32, 32))
    blocks = pw.Blocks([First(model), *model.blocks[1:]], x)
    settings = {"tied": model.characters, "optimizer": torch.optim.SGD}
    learner = pw.LocalNextToken(blocks, 65, **settings)
    return most_alive(lambda: learner.step(x, x)), most_alive(lambda: nats(model(x), x).backward())


def test_memory_does_not_grow_with_depth():
    """Everything that a step makes counts, gradients and temporary tensors too."""
    (four, plain_four), (eight, plain_eight) = memories(4), memories(8)
    assert eight <= 1.02 * four
    assert plain_eight > 1.8 * plain_four
    assert four < plain_four / 4
    assert eight < plain_eight / 8


def test_it_learns_the_next_token_and_can_be_read_at_every_depth():
    torch.manual_seed(0)
    x = (torch.arange(T + 1) + torch.arange(20)[:, None]) % V
    x, y = x[:, :-1], x[:, 1:]
    modules = [block.float() for block in transformer()]
    learner = pw.LocalNextToken(pw.Blocks(modules, x), V, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    for _ in range(60):
        losses = learner.step(x, y)
    assert (losses < 0.3).all()
    for depth in (1, 2, 3):
        path = learner.as_module(depth)
        assert (path(x).argmax(-1) == y).float().mean() > 0.9
        assert len(path.blocks) == depth
    assert torch.equal(learner.predict(x), learner.as_module()(x))


def test_a_rule_inside():
    found = []
    for rule in (None, pw.Backprop, lambda: pw.ProxProp(tau=1.0)):
        torch.manual_seed(0)
        modules, (x, y), recorded = transformer(), tokens(), Recorded()
        pw.LocalNextToken(pw.Blocks(modules, x), V, optimizer=recorded, rule=rule).step(x, y)
        found.append(recorded.of(modules))
    assert same_bits(found[0], found[1])
    assert relative(found[2], found[0]) > 1e-3


def test_what_it_refuses():
    modules, (x, y) = transformer(), tokens()
    blocks = pw.Blocks(modules, x)
    with pytest.raises(pw.BlockError, match="not part of the first block"):
        pw.LocalNextToken(blocks, V, tied=nn.Embedding(V, WIDTH), optimizer=Recorded())
    with pytest.raises(pw.BlockError, match="7 rows for 9 tokens"):
        pw.LocalNextToken(blocks, 9, tied=modules[0][0].tokens, optimizer=Recorded())
    with pytest.raises(ValueError, match="pieces"):
        pw.LocalNextToken(blocks, V, pieces=0, optimizer=Recorded())
    learner = pw.LocalNextToken(blocks, V, optimizer=Recorded())
    with pytest.raises(pw.PlywiseError, match=r"2 dimensions, not torch.int64 of shape \(5,\)"):
        learner.step(x, y[:, 0])
    with pytest.raises(pw.PlywiseError, match="not a token for each place"):
        learner.step(x, y[:, :-1])
