"""`plywise.split` cuts models that call their layers in a loop, and local learners train them."""

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from looped_models import BATCH, IDS, MASK, Looped, Parallel, Reversed, Scaled, Tied
from torch import nn

import plywise as pw
from plywise.data.models import call_model, find_scores
from plywise.local.heads import MeanLinear
from plywise.training.config import TrainConfig
from plywise.training.session import load_trained, open_session

Y = torch.tensor([0, 1, 2, 1])
TOKENS = torch.where(MASK.bool(), IDS % 5, -100)
SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def make(**sizes):
    torch.manual_seed(0)
    return Looped(**sizes)


def scores_of(model, x):
    with torch.no_grad():
        return find_scores(call_model(model.eval(), x))


def check_cut(model, blocks, x):
    """The blocks do what the model does, and hold each of its parameters once, under its name."""
    for block in blocks:
        block.eval()
    assert torch.equal(blocks.as_module()(x), scores_of(model, x))
    held = [(name, p) for block in blocks for name, p in block.named_parameters()]
    assert dict(held) == dict(model.named_parameters())
    assert len(held) == len(list(model.parameters()))


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_blocks_do_what_the_model_does(k, pair, per_token):
    model = make(pair=pair, per_token=per_token)
    blocks = pw.split(model, k, BATCH)
    assert len(blocks) == k
    assert blocks.carries
    check_cut(model, blocks, BATCH)
    assert blocks.shapes[0] == torch.Size([6])
    assert all(shape == torch.Size([6, 8]) for shape in blocks.shapes[1:-1])
    assert blocks.shapes[-1] == (torch.Size([6, 3]) if per_token else torch.Size([3]))


def test_one_tensor_and_a_tuple_are_inputs_too():
    for x in (IDS, (IDS, MASK)):
        model = make()
        check_cut(model, pw.split(model, 3, x), x)


def test_other_batches_have_other_masks_and_lengths():
    model = make()
    blocks = pw.split(model, 3, BATCH)
    other = {"input_ids": IDS[:, :4].flip(0), "attention_mask": MASK[:, :4]}
    check_cut(model, blocks, other)


def test_the_model_stays_as_it_is():
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, drawn = list(model.named_modules()), torch.random.get_rng_state()
    blocks = pw.split(model.train(), 3, BATCH)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    with pytest.raises(ValueError, match="no such word"):
        blocks[1](torch.zeros(4, 6, 8), {**BATCH, "input_ids": IDS + 100})
    assert list(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_block_runs_in_its_own_mode_and_sends_gradients_to_its_own_input():
    model = make()
    blocks = pw.split(model, 5, BATCH)
    s = torch.randn(4, 6, 8, requires_grad=True)
    first = blocks[2].train()(s, BATCH)
    assert not torch.equal(first, blocks[2](s, BATCH)), "dropout"
    first.sum().backward()
    assert s.grad is not None
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in blocks[2].named_parameters()
    }


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("pair", [False, True])
def test_every_block_but_the_first_depends_on_its_signal_alone(number, pair):
    """One for the embedding, three layers, one for the rest: none makes what another block hands on again."""
    model = make(pair=pair)
    block = pw.split(model, 5, BATCH)[number].eval()
    s = torch.randn(4, 6, 8, requires_grad=True)
    out = block(s, BATCH)
    (slope,) = torch.autograd.grad(out.square().sum(), s, retain_graph=True)
    assert slope.norm() > 0
    out.sum().backward()
    held = {name for name, _ in block.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == held
    with torch.no_grad():
        model.words.weight.add_(1)
        assert torch.equal(block(s, BATCH), out)


@pytest.mark.parametrize("k", [2, 4, 6])
def test_all_blocks_together_learn_as_backpropagation(k):
    """Interlocking over all blocks is backpropagation: the same weights after a step."""
    model = make(layers=4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    F.cross_entropy(call_model(plain, BATCH).logits, Y).backward()
    sgd.step()
    blocks = pw.split(model, k, BATCH)
    learner = pw.Interlocking(blocks, 3, horizon=k, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    learner.step(BATCH, Y)
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, wanted[name], atol=1e-6), name


@pytest.mark.parametrize("rule", [None, "ProxProp", "Foof"])
@pytest.mark.parametrize("learner", ["LocalLoss", "Interlocking", "ActivationRelaxation"])
@pytest.mark.parametrize("per_token", [False, True])
def test_learners_train_the_blocks(learner, rule, per_token):
    torch.manual_seed(0)
    model = Looped(classes=5, per_token=per_token)
    y = TOKENS if per_token else Y
    made = None if rule is None else lambda: getattr(pw, rule)()
    adam = lambda groups: torch.optim.AdamW(groups, lr=0.01)  # noqa: E731
    more = {} if learner == "ActivationRelaxation" else {"num_classes": 5}
    trained = getattr(pw, learner)(pw.split(model, 3, BATCH), **more, optimizer=adam, rule=made)
    first = trained.step(BATCH, y)
    assert any((trained.step(BATCH, y) < 0.7 * first).all() for _ in range(80))
    assert torch.equal(trained.predict(BATCH), scores_of(model, BATCH))


def test_padding_changes_nothing_for_a_learner_with_a_rule():
    updates = []
    for padding in (0, 9):
        torch.manual_seed(0)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        x = {name: F.pad(value, (0, padding)) for name, value in BATCH.items()}
        torch.manual_seed(1)
        blocks = pw.split(model, 5, x)
        torch.manual_seed(1)
        learner = pw.LocalLoss(
            blocks, 3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), rule=lambda: pw.ProxProp()
        )
        losses = [learner.step(x, Y) for _ in range(3)]
        updates.append((losses[-1], dict(model.named_parameters())))
    assert torch.allclose(updates[0][0], updates[1][0], atol=1e-5)
    for name, parameter in updates[0][1].items():
        assert torch.allclose(parameter, updates[1][1][name], atol=1e-4), name


def test_a_mean_over_positions_leaves_padding_out():
    head, s = MeanLinear(8, 3), torch.randn(4, 6, 8)
    slow = torch.stack(
        [head(row[: int(m.sum())].mean(0, keepdim=True))[0] for row, m in zip(s, MASK, strict=True)]
    )
    assert torch.allclose(head(s, MASK), slow, atol=1e-6)
    assert torch.allclose(head(s), head(s.mean(1)), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Tied, r"'words.weight' is used before and after 'layers'.* make the model untied"),
        (Reversed, r"'layers': its 3 layers are called in the order \[2, 1, 0\]"),
        (Scaled, "'layers': layer 1 does not get what layer 0 returned"),
        (Parallel, "'layers': layer 1 does not get what layer 0 returned"),
    ],
)
@pytest.mark.parametrize("x", [BATCH, IDS], ids=["dict", "tensor"])
def test_why_a_model_does_not_come_apart(model, words, x):
    with pytest.raises(pw.BlockError, match=words) as caught:
        pw.split(model(), 2, x)
    assert "Blocks([...], example)" in str(caught.value), "what to do"


def test_too_many_blocks_are_refused_by_name():
    with pytest.raises(pw.BlockError, match=r"into 5 at most \('layers.0', 'layers.0', .* 6 blocks"):
        pw.split(make(), 6, BATCH)
    with pytest.raises(pw.BlockError, match="no row of layers"):
        pw.split(nn.Linear(3, 2), 2, (torch.zeros(2, 3),))


# ---- by the command ------------------------------------------------------------------------------


@pytest.fixture
def _user(user_module):
    user_module(
        "looped",
        """
import torch
from looped_models import Looped
generator = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 11, (64, 6), generator=generator)
MASK = (torch.arange(6) < torch.randint(2, 7, (64, 1), generator=generator)).long()
LABELS = (IDS[:, 0] > 3).long() + (IDS[:, 0] > 7).long()
TAGS = torch.where(MASK.bool(), IDS % 5, -100)
def classes(): return Looped()
def tags(): return Looped(classes=5, per_token=True)
def of_classes(): return {"train": {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}}
def of_tags(): return {"train": {"input_ids": IDS, "attention_mask": MASK, "labels": TAGS}}
""",
    )
    shutil.copy(Path(__file__).with_name("looped_models.py"), "looped_models.py")


@pytest.mark.usefixtures("_user")
@pytest.mark.parametrize("what", ["classes", "tags"])
def test_train_goes_on_where_it_was_cut(what):
    def train(epochs, **more):
        session = open_session(
            TrainConfig(
                model=f"looped:{what}",
                data=f"looped:of_{what}",
                blocks=3,
                epochs=epochs,
                rate=0.02,
                batch_size=16,
                **more,
            )
        )
        lines = []
        session.run(lines.append)
        return session, lines

    whole, lines = train(6, rule="Foof")
    losses = [sum(line.losses.values()) for line in lines]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4]), "the last of six epochs of four steps, and the first"
    starts = whole.folder.record().starts
    assert len(starts) == 3
    parts = Path("parts")
    train(3, rule="Foof", out=parts, split=starts)
    resumed, _ = train(6, rule="Foof", out=parts, split=starts)
    states = [one.engine.learner.as_module().state_dict() for one in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert load_trained("runs/train")(BATCH).shape == ((4, 3) if what == "classes" else (4, 6, 5))


# ---- of Hugging Face -----------------------------------------------------------------------------


def make_transformer(name):
    """A small model of transformers, and a batch for it."""
    tf = pytest.importorskip("transformers", reason="its models are cut")
    torch.manual_seed(0)
    ids = torch.randint(5, 31, (4, 6), generator=torch.Generator().manual_seed(1))
    text = {"input_ids": ids * MASK, "attention_mask": MASK}
    sizes = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 16}
    of_gpt2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 31, "n_positions": 16}
    of_gpt2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    of_image = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    untied = {"tie_word_embeddings": False}
    made = {
        "bert": lambda: (tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=3)), text, Y),
        "bert, tokens": lambda: (
            tf.BertForTokenClassification(tf.BertConfig(**sizes, num_labels=5)),
            text,
            TOKENS,
        ),
        "bert, words": lambda: (tf.BertForMaskedLM(tf.BertConfig(**sizes, **untied)), text, TOKENS),
        "gpt2": lambda: (tf.GPT2LMHeadModel(tf.GPT2Config(**of_gpt2, **untied)), text, TOKENS),
        "gpt2, classes": lambda: (
            tf.GPT2ForSequenceClassification(tf.GPT2Config(**of_gpt2, num_labels=3)),
            text,
            Y,
        ),
        "llama": lambda: (
            tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2, **untied)),
            text,
            TOKENS,
        ),
        "vit": lambda: (
            tf.ViTForImageClassification(
                tf.ViTConfig(
                    **{k: v for k, v in SMALL.items() if k != "vocab_size"}, intermediate_size=32, **of_image
                )
            ),
            torch.randn(4, 3, 8, 8),
            Y,
        ),
        "tied": lambda: (tf.GPT2LMHeadModel(tf.GPT2Config(**of_gpt2)), text, TOKENS),
    }
    return made[name]()


FAMILIES = ["bert", "bert, tokens", "bert, words", "gpt2", "gpt2, classes", "llama", "vit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers_come_apart_and_train(name):
    model, x, y = make_transformer(name)
    blocks = pw.split(model, 3, x)
    check_cut(model, blocks, x)
    outputs = blocks.shapes[-1][-1]
    learner = pw.LocalLoss(
        blocks,
        outputs,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01),
        rule=lambda: pw.ProxProp(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = learner.step(x, y)
        assert any((learner.step(x, y) < 0.8 * first).all() for _ in range(60))


def test_tied_words_of_transformers_are_told():
    model, x, _ = make_transformer("tied")
    with pytest.raises(
        pw.BlockError, match=r"transformer.wte.weight' is used before and after .*tie_word_emb"
    ):
        pw.split(model, 3, x)
