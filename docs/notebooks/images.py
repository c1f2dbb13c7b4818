# %% [markdown]
# # A vision transformer on augmented images: AdamW, Muon and the recommended method
#
# Thirty lines compare three ways to train a small ViT, fed by a `DataLoader` of randomly shifted images.
# The images are the handwritten digits that come with plywise, so that it runs offline, in about five minutes
# on one core.
#
# [Open it in Colab][colab], or [get the file][file] for Jupyter. In Colab run this first:
# `%pip install "plywise[bench] @ git+https://github.com/plywise/plywise" transformers`
#
# [colab]: https://colab.research.google.com/github/plywise/plywise/blob/main/docs/tutorials/images.ipynb
# [file]: https://github.com/plywise/plywise/raw/main/docs/tutorials/images.ipynb
#
# ## The data
#
# A loader is read once, so that every method trains on the same batches. With ten copies of the set in it,
# each image is there ten times, shifted in ten ways. Validation and test images are not shifted.

# %%
import torch
from torch.nn.functional import pad
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import ViTConfig, ViTForImageClassification

import plywise as pw
from plywise.data.digits import load_digits

train, validation, test = load_digits()


class Shifted(Dataset):
    def __len__(self):
        return len(train.y)

    def __getitem__(self, index):
        top, left = torch.randint(3, (2,)).tolist()
        padded = pad(train.x[index].view(1, 8, 8), (1, 1, 1, 1))
        return padded[:, top : top + 8, left : left + 8], train.y[index]


torch.manual_seed(0)
data = {"train": DataLoader(ConcatDataset([Shifted()] * 10), batch_size=64, shuffle=True)}
data |= {
    "validation": (validation.x.view(-1, 1, 8, 8), validation.y),
    "test": (test.x.view(-1, 1, 8, 8), test.y),
}

# %% [markdown]
# ## The model
#
# A ViT of [transformers](https://huggingface.co/docs/transformers): 16 patches of 2×2 pixels, three layers
# of width 48. A model of [timm](https://huggingface.co/docs/timm) goes in its place in one line: see [its
# page](../how-to/timm.md).


# %%
def make_model():
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    return ViTForImageClassification(ViTConfig(**image, **sizes))


# %% [markdown]
# ## The comparison
#
# Each method gets the same number of tuning trials, which choose its rate by the validation loss; then it
# trains from three fresh seeds. `recommended` is what `pw.recommend(model)` makes: Muon and AdamW in
# coordinates that are chosen for the model. The times are CPU seconds; the machine that ran this was shared
# with others.

# %%
METHODS = ["adamw", "muon", "recommended"]
HOW = {"trials": 4, "seeds": 3, "steps": 250, "progress": False}
report = pw.arena.bench(make_model, data, methods=METHODS, out="runs/images", **HOW)
report

# %%
report.plot("curves")

# %% [markdown]
# The line is the median of the seeds, the band is their range. The next picture shows where each method
# ends, and after how many seconds.

# %%
report.plot("pareto")
