"""Families built by other packages: timm, torch_geometric, diffusers and peft."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coverage_families.family import CLASSES, Family, make_images, make_labels
from coverage_families.standard import classify
from coverage_families.transformers_models import DECODER, build_small, predict_next

# ---- timm ------------------------------------------------------------------------------------------


class _AnyName(type):
    """A class that has every attribute, each again such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _FalseModule(ModuleType):
    """A module that has every name; each is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


TORCHVISION = (
    "torchvision",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.models",
    "torchvision.utils",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.datasets",
    "torchvision.models.feature_extraction",
    "torchvision.datasets.folder",
)
"""The modules of torchvision that timm imports."""


@contextmanager
def pretend_torchvision() -> Iterator[None]:
    """Let timm be imported without torchvision, which its models use for isinstance tests only.

    No build of torchvision goes with the CPU build of torch here, and a copy of torchvision that does not
    go with torch fails when it is imported.
    """
    kept = {name: sys.modules.pop(name) for name in TORCHVISION if name in sys.modules}
    sys.modules.update({name: _FalseModule(name) for name in TORCHVISION})
    try:
        yield
    finally:
        for name in TORCHVISION:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def make_timm(name: str, model_name: str, **settings: Any) -> Family:
    """Return the family of a model of timm."""

    def build() -> nn.Module:
        with pretend_torchvision():
            import timm
        return timm.create_model(model_name, num_classes=CLASSES, **settings)

    return Family(f"timm {name}", build, classify(2, 3, 32, 32), "timm")


SMALL = {"depths": (1, 1, 1, 1)}

TIMM = (
    make_timm("resnet", "resnet10t", stem_width=8, channels=(16, 16, 32, 32)),
    make_timm("convnext", "convnext_atto", dims=(16, 24, 32, 48), **SMALL),
    make_timm(
        "swin", "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1, 1)
    ),
    make_timm("mobilenet v3", "mobilenetv3_small_050"),
    make_timm("nf-resnet", "nf_resnet26", channels=(32, 32, 64, 64), stem_chs=16, **SMALL),
    make_timm("vit", "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2),
)

# ---- torch_geometric -------------------------------------------------------------------------------


class GraphClassifier(nn.Module):
    """Two graph convolutions and a linear head for nodes."""

    def __init__(self, convolution: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = convolution(24, 48), convolution(48, 48)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x, edges)), edges)))


def classify_nodes(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(16, 24), torch.randint(16, (2, 40))), make_labels(16))


def make_graph(name: str, make_convolution: Callable[[Any, int, int], nn.Module]) -> Family:
    """Return the family of a convolution of torch_geometric."""

    def build() -> nn.Module:
        from torch_geometric import nn as geometric

        return GraphClassifier(lambda inputs, outputs: make_convolution(geometric, inputs, outputs))

    return Family(f"pyg {name}", build, classify_nodes, "torch_geometric")


def make_perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


class RelationalConvolution(nn.Module):
    """A graph convolution with three kinds of edges."""

    def __init__(self, geometric: Any, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = geometric.RGCNConv(inputs, outputs, num_relations=3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.convolution(x, edges, torch.arange(edges.shape[1]) % 3)


GRAPHS = (
    make_graph("gcn", lambda geometric, i, o: geometric.GCNConv(i, o)),
    make_graph("gat", lambda geometric, i, o: geometric.GATConv(i, o // 4, heads=4)),
    make_graph("graphsage", lambda geometric, i, o: geometric.SAGEConv(i, o)),
    make_graph("gin", lambda geometric, i, o: geometric.GINConv(make_perceptron(i, o), train_eps=True)),
    make_graph("transformer", lambda geometric, i, o: geometric.TransformerConv(i, o // 4, heads=4)),
    make_graph("rgcn", lambda geometric, i, o: RelationalConvolution(geometric, i, o)),
)


# ---- diffusers and peft ----------------------------------------------------------------------------


def build_diffusion_unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


def build_diffusion_transformer() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=3,
        num_layers=2,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=8,
    )


def predict_noise(model: nn.Module) -> Tensor:
    noise, labels = make_images(), {}
    if type(model).__name__.startswith("DiT"):
        labels = {"class_labels": make_labels()}
    return F.mse_loss(model(make_images(), torch.randint(100, (4,)), **labels).sample, noise)


def make_peft(name: str, settings: dict[str, Any]) -> Family:
    """Return a small Llama with adapters of peft."""

    def build() -> nn.Module:
        import peft

        adapters = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, **settings)
        return peft.get_peft_model(build_small("LlamaForCausalLM", **DECODER)(), adapters)

    return Family(f"peft {name}", build, predict_next, "peft")


OTHERS = (
    Family("diffusers unet", build_diffusion_unet, predict_noise, "diffusers"),
    Family("diffusers dit", build_diffusion_transformer, predict_noise, "diffusers"),
    make_peft("lora", {}),
    make_peft("dora", {"use_dora": True}),
)

PACKAGES = (*TIMM, *GRAPHS, *OTHERS)
