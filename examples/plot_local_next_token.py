"""
Training the blocks of a language model separately
==================================================

This example trains a small character-level transformer on the documentation of ``torch.nn``, with
``plywise.LocalNextToken`` and with backpropagation. ``LocalNextToken`` gives each of the three blocks its own
head, which predicts the next character. No gradient flows between blocks, so only one block's activations
are kept for backward at a time. Backpropagation trains the same blocks, from the same initial weights, with
the loss of the last head. The plot shows the loss of each depth on held-out text.
"""

import copy
import inspect

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import plywise as pw

CONTEXT, WIDTH, STEPS, EVERY, RATE = 48, 48, 300, 25, 3e-3
modules = [value for _, value in inspect.getmembers(nn, inspect.isclass)]
text = "\n".join(inspect.getdoc(module) or "" for module in modules)
characters = sorted(set(text))
tokens = torch.tensor([characters.index(character) for character in text])
windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
held, train = windows[-150:], windows[:-150]
print(f"{len(text):,} characters, vocabulary of {len(characters)}")

# %%
# The model has three blocks. The first one begins with the embedding, whose weights all heads share.


class Embed(nn.Module):
    """Embeds characters and their positions."""

    def __init__(self):
        super().__init__()
        self.characters = nn.Embedding(len(characters), WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x):
        return self.characters(x) + self.positions.weight


class Block(nn.TransformerEncoderLayer):
    """A layer in which each position attends only to itself and earlier positions."""

    def __init__(self):
        settings = {"activation": "gelu", "batch_first": True, "norm_first": True}
        super().__init__(WIDTH, 4, 4 * WIDTH, dropout=0.0, **settings)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x):
        return super().forward(x, src_mask=self.mask, is_causal=True)


torch.manual_seed(0)
embed = Embed()
blocks = [nn.Sequential(embed, Block()), Block(), Block()]
norm = nn.LayerNorm(WIDTH)
plain_blocks, plain_norm = copy.deepcopy((blocks, norm))


def compute_loss(scores, window):
    """Return the mean cross-entropy of the next characters, in nats."""
    return F.cross_entropy(scores.flatten(0, 1), window[:, 1:].flatten())


# %%
# Both methods train on the same batches.


def make_adam(parameters):
    return torch.optim.Adam(parameters, lr=RATE)


learner = pw.LocalNextToken(
    pw.Blocks(blocks, train[:2, :-1]), len(characters), tied=embed.characters, optimizer=make_adam
)
plain = nn.Sequential(*plain_blocks, plain_norm)
optimizer = make_adam(plain.parameters())


def compute_plain_scores(window):
    """Return the scores of the network that backpropagation trains."""
    return plain(window[:, :-1]) @ plain[0][0].characters.weight.T


curves = {name: [] for name in ("1 block", "2 blocks", "3 blocks", "backpropagation, 3 blocks")}
generator = torch.Generator().manual_seed(0)
for step in range(1, STEPS + 1):
    window = train[torch.randint(len(train), (16,), generator=generator)]
    learner.step(window[:, :-1], window[:, 1:])
    optimizer.zero_grad()
    compute_loss(compute_plain_scores(window), window).backward()
    optimizer.step()
    if step % EVERY == 0:
        with torch.no_grad():
            for depth, name in enumerate(list(curves)[:3], start=1):
                curves[name].append(compute_loss(learner.as_module(depth).eval()(held[:, :-1]), held).item())
            curves["backpropagation, 3 blocks"].append(compute_loss(compute_plain_scores(held), held).item())
for name, curve in curves.items():
    print(f"{name:26} {curve[-1]:.3f} nats per character")

# %%
# The held-out loss during training.

figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
for name, curve in curves.items():
    style = {"color": "black", "ls": ":"} if name.startswith("back") else {}
    axis.plot(range(EVERY, STEPS + 1, EVERY), curve, label=name, **style)
axis.set(xlabel="steps", ylabel="nats per character, held out", title="Each block with its own head")
axis.legend()
plt.show()
