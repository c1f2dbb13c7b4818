"""Models whose forward calls its layers in a loop, sound and unsound; nothing of this can be traced."""

from dataclasses import dataclass

import torch
from torch import nn

IDS = torch.randint(1, 11, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Layer(nn.Module):
    kind = "full"

    def __init__(self, width, pair):
        super().__init__()
        self.mixer, self.feed, self.norm = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.LayerNorm(width),
        )
        self.drop = nn.Dropout(0.1)
        self.pair = pair

    def forward(self, hidden, mask=None, positions=None):
        share = mask.unsqueeze(1) / mask.sum(1).reshape(-1, 1, 1)
        mixed = share @ self.mixer(hidden + positions)
        out = self.norm(hidden + self.drop(torch.tanh(self.feed(mixed))))
        return (out, mixed) if self.pair else out


class Looped(nn.Module):
    """A transformer without attention: embedding, layers, norm, head; it makes masks and positions itself."""

    def __init__(self, layers=3, width=8, classes=3, per_token=False, pair=False):
        super().__init__()
        self.words = nn.Embedding(11, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleList(Layer(width, pair) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.per_token = per_token

    def begin(self, input_ids, attention_mask):
        mask = torch.ones(input_ids.shape) if attention_mask is None else attention_mask.float()
        positions = torch.arange(input_ids.shape[1]).float().reshape(1, -1, 1) / 10
        return self.words(input_ids) * self.scale, mask, positions

    def finish(self, hidden, mask):
        if not self.per_token:
            hidden = (hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        return Output(self.head(self.norm(hidden)), hidden)

    def forward(self, input_ids, attention_mask=None):
        if int(input_ids.max()) > 99:  # what no trace can follow
            raise ValueError("no such word")
        hidden, mask, positions = self.begin(input_ids, attention_mask)
        for layer in self.layers:
            masks = {"full": mask}
            out = layer(hidden, mask=masks[layer.kind], positions=positions)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.finish(hidden, mask)


class Tied(Looped):
    def finish(self, hidden, mask):
        return Output(hidden @ self.words.weight.t(), hidden)


class Reversed(Looped):
    def forward(self, input_ids, attention_mask=None):
        self.float() if int(input_ids.max()) > 99 else None
        hidden, mask, positions = self.begin(input_ids, attention_mask)
        for layer in reversed(self.layers):
            hidden = layer(hidden, mask, positions)
        return self.finish(hidden, mask)


class Scaled(Looped):
    def forward(self, input_ids, attention_mask=None):
        self.float() if int(input_ids.max()) > 99 else None
        hidden, mask, positions = self.begin(input_ids, attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask, positions) * 0.5
        return self.finish(hidden, mask)


class Parallel(Looped):
    def forward(self, input_ids, attention_mask=None):
        self.float() if int(input_ids.max()) > 99 else None
        hidden, mask, positions = self.begin(input_ids, attention_mask)
        return self.finish(sum(layer(hidden, mask, positions) for layer in self.layers), mask)
