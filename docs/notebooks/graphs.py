# %% [markdown]
# # A graph network: AdamW, Muon and the recommended method
#
# Thirty lines compare three ways to train a network of [PyG](https://pytorch-geometric.readthedocs.io) that
# classifies graphs. The graphs are handwritten digits: a node for each pixel with ink, edges between
# neighbours. It runs offline, in about five minutes on one core.
#
# [Open it in Colab][colab], or [get the file][file] for Jupyter. In Colab run this first:
# `%pip install "plywise[bench] @ git+https://github.com/plywise/plywise" torch_geometric`
#
# [colab]: https://colab.research.google.com/github/plywise/plywise/blob/main/docs/tutorials/graphs.ipynb
# [file]: https://github.com/plywise/plywise/raw/main/docs/tutorials/graphs.ipynb
#
# ## The data
#
# A batch of PyG is many graphs in one; `to_dict` makes a dict of tensors of it. Nodes and graphs are not
# equal in number, so that plywise cannot tell samples by itself: a step function of the model and a batch
# says what the loss is, and another what to judge by.

# %%
from torch import cat
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GIN, global_mean_pool
from torch_geometric.utils import grid, subgraph

import plywise as pw
from plywise.data.digits import load_digits

edges, places = grid(8, 8)


def make_graph(image, label):
    ink = image > 0
    kept, _ = subgraph(ink, edges, relabel_nodes=True)
    return Data(x=cat([places[ink] / 4 - 1, image[ink, None]], 1), edge_index=kept, y=label)


def make_loader(part):
    graphs = [make_graph(image, label) for image, label in zip(part.x, part.y, strict=True)]
    return DataLoader(graphs, 64, collate_fn=lambda some: Batch.from_data_list(some).to_dict())


data = dict(zip(("train", "validation", "test"), map(make_loader, load_digits()), strict=True))

# %% [markdown]
# ## The model
#
# A graph isomorphism network with batch norm gives scores at each node; those of a graph are their mean.


# %%
def make_model():
    return GIN(in_channels=3, hidden_channels=64, num_layers=3, out_channels=10, norm="batch_norm")


def score(model, batch):
    return global_mean_pool(model(batch["x"], batch["edge_index"]), batch["batch"])


def step(model, batch):
    return cross_entropy(score(model, batch), batch["y"])


def metric(model, batch):
    return (score(model, batch).argmax(1) != batch["y"]).float().mean()


# %% [markdown]
# ## The comparison
#
# Each method gets the same number of tuning trials, which choose its rate by the validation loss; then it
# trains from three fresh seeds. `recommended` is what `pw.recommend(model)` makes: Muon and AdamW in
# coordinates that are chosen for the model. The times are CPU seconds; the machine that ran this was shared
# with others.

# %%
METHODS = ["adamw", "muon", "recommended"]
HOW = {"step": step, "metric": metric, "trials": 8, "seeds": 3, "steps": 400, "progress": False}
report = pw.arena.bench(make_model, data, methods=METHODS, out="runs/graphs", **HOW)
report

# %% [markdown]
# The ranking is by the time to the target, as a multiple of the best baseline's, with its interval; the
# sentences say what is beyond noise. In the picture, the line is the median of the seeds, the band is their
# range.

# %%
report.plot("curves")
