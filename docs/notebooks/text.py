# %% [markdown]
# # BERT on text: AdamW, Muon and the recommended method
#
# Thirty lines compare three ways to train a small BERT of
# [transformers](https://huggingface.co/docs/transformers), with equal tuning for each. The model has random
# weights, and the text comes with the packages: it runs offline, in about five minutes on one core.
#
# [Open it in Colab][colab], or [get the file][file] for Jupyter. In Colab run this first:
# `%pip install "plywise[bench] @ git+https://github.com/plywise/plywise" transformers`
#
# [colab]: https://colab.research.google.com/github/plywise/plywise/blob/main/docs/tutorials/text.ipynb
# [file]: https://github.com/plywise/plywise/raw/main/docs/tutorials/text.ipynb
#
# ## The data
#
# Lines of documentation: is a line from torch or from numpy? Each character is a token. The attention mask
# keeps padding out of what the methods measure.

# %%
import inspect

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import plywise as pw


def find_lines(module):
    pages = [inspect.getdoc(thing) or "" for thing in vars(module).values() if callable(thing)]
    return sorted({line.strip()[:32] for page in pages for line in page.splitlines() if len(line) > 40})


pairs = [(line, label) for label, of in enumerate((torch, np)) for line in find_lines(of)[::8]]
ids = torch.zeros(len(pairs), 32, dtype=torch.long)
for row, (line, _) in zip(ids, pairs, strict=True):
    row[: len(line)] = torch.tensor([min(ord(character), 127) for character in line])
labels = torch.tensor([label for _, label in pairs])
data = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
print(f"{len(pairs)} lines, {labels.bincount().tolist()} of torch and numpy; one of them: {pairs[100][0]!r}")

# %% [markdown]
# ## The model
#
# A function that makes a new one. Each run of the comparison calls it again, after it has set the seed.


# %%
def make_model():
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return BertForSequenceClassification(BertConfig(vocab_size=128, **sizes))


# %% [markdown]
# ## The comparison
#
# Each method gets the same number of tuning trials, which choose its rate by the validation loss; then it
# trains from fresh seeds. `recommended` is what `pw.recommend(model)` makes: Muon and AdamW in
# coordinates that are chosen for the model. The times are CPU seconds; the machine that ran this was shared
# with others.

# %%
METHODS = ["adamw", "muon", "recommended"]
HOW = {"trials": 3, "seeds": 3, "steps": 200, "batch_size": 32, "progress": False}
report = pw.arena.bench(make_model, data, methods=METHODS, out="runs/text", **HOW)
report

# %% [markdown]
# The first column of numbers says who is best, the second how long each method takes to the target, as a
# multiple of the best baseline's time, with its interval. The sentences below say what is beyond noise.

# %%
report.plot("curves")

# %% [markdown]
# The line is the median of the seeds, the band is their range. The next picture has a point for each tuning
# trial: a flat curve means that a method forgives a wrong rate.

# %%
report.plot("rates")
