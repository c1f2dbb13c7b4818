"""Torch functions that can be linear in a parameter: how each call is read, and captured.

A reader gets the capture, the function and its arguments, and returns the call's output. It captures the call
if one of the arguments is a parameter that the rule takes; otherwise torch makes the call. Unusual calls
(``out=``, ``alpha=``, sparse arguments) are left to torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plywise.engine.readers.attention import read_attention
from plywise.engine.readers.common import Reader
from plywise.engine.readers.contractions import read_inner, read_matmul, read_tensordot
from plywise.engine.readers.convolutions import read_convolution, read_transposed_convolution
from plywise.engine.readers.einsum import read_einsum, read_grouped_product
from plywise.engine.readers.lookups import read_bilinear, read_embedding, read_embedding_bag
from plywise.engine.readers.norms import (
    read_batch_norm,
    read_group_norm,
    read_layer_norm,
    read_rms_norm,
    read_scale,
)
from plywise.engine.readers.products import (
    LINEAR,
    read_addmm,
    read_baddbmm,
    read_linear,
    read_product,
    read_reversed_product,
)

READERS: dict[Any, Reader] = {
    LINEAR: read_linear,
    **dict.fromkeys((torch.mm, Tensor.mm), read_product),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul, torch.bmm, Tensor.bmm),
        read_matmul,
    ),
    torch.tensordot: read_tensordot,
    **dict.fromkeys((torch.inner, Tensor.inner), read_inner),
    Tensor.__rmatmul__: read_reversed_product,
    **dict.fromkeys((torch.addmm, Tensor.addmm), read_addmm),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), read_baddbmm),
    torch.einsum: read_einsum,
    **{
        function: read_grouped_product
        for function in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))
        if function is not None
    },
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), read_convolution),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), read_transposed_convolution
    ),
    F.multi_head_attention_forward: read_attention,
    F.embedding: read_embedding,
    F.embedding_bag: read_embedding_bag,
    torch.bilinear: read_bilinear,
    F.layer_norm: read_layer_norm,
    F.rms_norm: read_rms_norm,
    F.group_norm: read_group_norm,
    F.batch_norm: read_batch_norm,
    F.instance_norm: read_batch_norm,
}
"""A reader for each torch function."""

SCALE_READERS: dict[Any, Reader] = dict.fromkeys(
    (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), read_scale
)
"""Readers of elementwise products, as norms written by hand use them."""


def make_readers(kinds: frozenset[str]) -> dict[Any, Reader]:
    """Return the readers for a rule that takes these kinds of maps.

    Elementwise products are looked at only for a rule that takes norms: there are many of them.
    """
    return {**READERS, **(SCALE_READERS if "norm" in kinds else {})}
