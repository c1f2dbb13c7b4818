"""Local losses: each block and its head by themselves, and one block as backpropagation."""

import copy

import pytest
import torch
from moves import Recorded, backprop, batch, conv_blocks, counting_forwards, moves, same_bits, tanh_blocks
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import plywise as pw
from plywise.local.heads import pooled_linear


def local(blocks, **settings):
    return pw.LocalLoss(blocks, num_classes=3, **settings)


def kept_heads(heads):
    """A factory that remembers what it made."""

    def make(shape, num_classes):
        heads.append(pooled_linear(shape, num_classes).double())
        return heads[-1]

    return make


def test_each_block_and_its_head_follow_their_loss_alone():
    modules, heads, (x, y), recorded = tanh_blocks(), [], batch(9, 5), Recorded()
    learner = local(pw.Blocks(modules, x), head=kept_heads(heads), optimizer=recorded)
    s, wanted, losses = x, [], []
    for i, block in enumerate(modules):
        out = block(s.detach())
        loss = cross_entropy(heads[i](out) if i < len(heads) else out, y)
        parts = [*block.parameters(), *(heads[i].parameters() if i < len(heads) else ())]
        wanted.append(dict(zip(parts, torch.autograd.grad(loss, parts), strict=True)))
        losses.append(loss)
        s = out
    assert torch.equal(learner.step(x, y), torch.stack(losses).detach())
    assert len(heads) == 3
    for gradients in wanted:
        for parameter, gradient in gradients.items():
            assert torch.equal(recorded.gradients[parameter], gradient)


def test_one_block_is_backpropagation():
    """Every bit, over some steps with momentum."""
    network = nn.Sequential(*tanh_blocks())
    plain, (x, y) = copy.deepcopy(network), batch(9, 5)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)

    learner, optimizer = local(pw.Blocks([network], x), optimizer=sgd), sgd(plain.parameters())
    for _ in range(4):
        loss = cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(learner.step(x, y)[0], loss.detach())
    assert same_bits(list(network.parameters()), list(plain.parameters()))


def test_the_rule_backprop_changes_no_bit():
    modules, (x, y), found = tanh_blocks(), batch(9, 5), []
    for rule in (None, pw.Backprop):
        torch.manual_seed(1)  # of the heads
        found.append(moves(local, copy.deepcopy(modules), x, y, rule=rule))
    assert same_bits(*found)


def test_a_rule_in_every_block():
    """ProxProp moves blocks otherwise than gradients do, and trains."""
    modules, (x, y) = tanh_blocks(), batch(64, 5)
    torch.manual_seed(1)
    plain = moves(local, copy.deepcopy(modules), x, y)
    torch.manual_seed(1)
    recorded = Recorded(rate=20.0)
    learner = local(pw.Blocks(modules, x), optimizer=recorded, rule=lambda: pw.ProxProp(tau=1.0))
    before = learner.step(x, y)
    for found, gradient in zip(recorded.of(modules), plain, strict=True):
        assert not torch.allclose(found, gradient)
    for _ in range(40):
        after = learner.step(x, y)
    assert (after < before / 2).all()


def test_frozen_weights_stay():
    """A whole block, and one weight of another; the rest learns."""
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    modules[1].requires_grad_(False)
    modules[2][0].weight.requires_grad_(False)
    before = [copy.deepcopy(block.state_dict()) for block in modules]
    local(pw.Blocks(modules, x), optimizer=Recorded()).step(x, y)
    after = [block.state_dict() for block in modules]
    assert same_bits(list(after[1].values()), list(before[1].values()))
    assert torch.equal(after[2]["0.weight"], before[2]["0.weight"])
    assert not torch.equal(after[2]["0.bias"], before[2]["0.bias"])
    for i in (0, 3):
        assert not same_bits(list(after[i].values()), list(before[i].values()))


@pytest.mark.parametrize(
    "make",
    [
        local,
        lambda blocks, **settings: pw.Interlocking(blocks, 3, horizon=3, **settings),
        lambda blocks, **settings: pw.ActivationRelaxation(blocks, rate=0.5, iterations=20, **settings),
    ],
    ids=["LocalLoss", "Interlocking", "ActivationRelaxation"],
)
class TestEveryLearnerWithBlocks:
    def test_a_block_runs_once_a_step(self, make):
        """Batch norm counts its batches, a hook the forwards."""
        modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
        learner = make(pw.Blocks(modules, x), optimizer=Recorded())
        with counting_forwards(modules) as counts:
            for _ in range(3):
                learner.step(x, y)
        assert set(counts.values()) == {3}
        norms = [m for block in modules for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [int(norm.num_batches_tracked) for norm in norms] == [3, 3]

    def test_statistics_are_those_of_the_batch(self, make):
        modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
        seen = modules[0][0](x).mean((0, 2, 3)).detach()
        make(pw.Blocks(modules, x), optimizer=Recorded()).step(x, y)
        assert torch.allclose(modules[0][1].running_mean, 0.1 * seen, rtol=1e-12)

    def test_gradients_left_by_others_do_not_count(self, make):
        """Nor those of a step that failed halfway."""
        found = []
        for spoil in (False, True):
            torch.manual_seed(1)
            modules, (x, y) = tanh_blocks(), batch(9, 5)
            learner = make(pw.Blocks(modules, x), optimizer=Recorded())
            if spoil:
                learner.as_module()(x).sum().backward()
            learner.step(x, y)
            found.append([p for block in modules for p in block.parameters()])
        assert same_bits(*found)

    def test_the_callers_random_numbers_go_on_untouched(self, make):
        modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
        learner = make(pw.Blocks(modules, x), optimizer=Recorded())
        state = torch.get_rng_state()
        learner.step(x, y)
        assert torch.equal(torch.get_rng_state(), state)

    def test_as_module_is_the_plain_chain(self, make):
        modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
        learner = make(pw.Blocks(modules, x), optimizer=Recorded())
        learner.step(x, y)
        network = learner.as_module()
        assert type(network) is nn.Sequential
        assert list(network) == modules
        found = learner.predict(x)
        assert torch.equal(found, network.eval()(x))

    def test_targets_out_of_range(self, make):
        modules, (x, y) = tanh_blocks(), batch(9, 5)
        learner = make(pw.Blocks(modules, x), optimizer=Recorded())
        with pytest.raises(pw.PlywiseError, match="0 … 2; this batch has 1 … 3"):
            learner.step(x, torch.arange(9) % 3 + 1)
        with pytest.raises(pw.PlywiseError, match="class indices"):
            learner.step(x, y.double())

    def test_another_loss_takes_its_own_targets(self, make):
        modules, (x, _) = tanh_blocks(), batch(64, 5)
        learner = make(pw.Blocks(modules, x), optimizer=Recorded(), loss=mse_loss)
        target = x[:, :3]
        losses = [learner.step(x, target)[-1] for _ in range(60)]
        assert losses[-1] < 0.95 * losses[0]


def test_heads_pool_to_at_most_two_by_two():
    shapes = {(16, 8, 5): 64, (16, 1, 7): 32, (6, 9): 12, (4, 3, 3, 3): 32, (10,): 10, (6, 2, 2): 24}
    for shape, features in shapes.items():
        head = pooled_linear(torch.Size(shape), 3)
        assert head[-1].in_features == features
        assert head(torch.randn(4, *shape)).shape == (4, 3)


def test_head_of_ones_averages():
    """The scores are sums of the four quarters' means."""
    x, head = torch.randn(2, 3, 4, 4), pooled_linear(torch.Size([3, 4, 4]), 1)
    nn.init.ones_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    assert torch.allclose(head(x).flatten(), 4 * x.mean((2, 3)).sum(1), atol=1e-6)


def test_heads_have_their_blocks_dtype():
    """Also behind a block without parameters."""
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    learner = local(pw.Blocks(modules, x), optimizer=Recorded())
    dtypes = {p.dtype for trainer in learner.trainers for p in trainer.component.parameters()}
    assert dtypes == {torch.float64}
    assert learner.step(x, y).dtype == torch.float64


def test_a_network_without_classifier_is_refused():
    x, _ = batch(9, 5)
    with pytest.raises(pw.BlockError, match=r"\(8,\).*3 classes"):
        local(pw.Blocks(tanh_blocks()[:3], x), optimizer=Recorded())


def test_a_head_that_changes_the_activations_is_refused():
    x, y = batch(9, 5)

    def make_head(shape, classes):
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(shape.numel(), classes))

    modules = [nn.Linear(5, 6).double(), nn.Linear(6, 3).double()]
    learner = local(pw.Blocks(modules, x), head=make_head, optimizer=Recorded())
    with pytest.raises(pw.BlockError, match="in place"):
        learner.step(x, y)


def test_gradients_agree_with_backpropagation_for_the_last_block_alone():
    """The last block has the loss itself; blocks before it do not."""
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    wanted = backprop(modules, cross_entropy, x, y)
    found = moves(local, modules, x, y)
    assert same_bits(found[-2:], wanted[-2:])
    for f, w in zip(found[:-2], wanted[:-2], strict=True):
        assert not torch.allclose(f, w)


@pytest.mark.parametrize(("count", "words"), [(1, "one number."), (4, "one score for each of 4 classes.")])
def test_a_last_block_without_a_prediction_is_refused_in_words_that_fit(count, words):
    blocks = pw.Blocks([nn.Linear(4, 8), nn.Linear(8, 3)], torch.randn(2, 4))
    with pytest.raises(pw.BlockError, match=rf"its output is the prediction: {words} Put"):
        pw.LocalLoss(blocks, num_classes=count, optimizer=torch.optim.SGD)
