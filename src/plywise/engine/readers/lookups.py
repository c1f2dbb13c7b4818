"""Embeddings, bags of embeddings, and bilinear maps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plywise.engine.capture.capture import Capture
from plywise.engine.capture.captured_call import apply_tapped
from plywise.engine.maps.affine import Bilinear
from plywise.engine.maps.layouts import PLAIN, TRANSPOSED
from plywise.engine.maps.lookups import Embedding, EmbeddingBag
from plywise.engine.readers.common import Args, Kwargs, keep_input, leave_graph, pick_argument, tap


def read_embedding(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.embedding``; calls that renormalise the table or scale by frequency are left to torch."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    x, weight, padding, most, _, scaled, sparse = [
        pick_argument(args, kwargs, i, n, d)
        for i, (n, d) in enumerate(zip(names, (None, None, None, None, 2.0, False, False), strict=True))
    ]
    if most is None and not scaled and weight.dim() == 2:
        entries = weight.shape[0]
        map_ = Embedding(entries, None if padding is None else padding % entries)
        site = capture.find_site(weight, map_, TRANSPOSED, None, x)
        if site is not None and sparse:
            capture.leave_alone(site, "its gradient is sparse: a rule's update is not")
        elif site is not None:
            return tap(capture, site, lambda a, w, b: F.embedding(a, w, padding), keep_input, x, weight, None)
    return func(*args, **kwargs)


def read_embedding_bag(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.embedding_bag`` in its modes "sum" and "mean"."""
    names = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse")
    defaults = (None, None, None, None, 2, False, "mean", False)
    x, weight, offsets, most, _, scaled, mode, sparse = [
        pick_argument(args, kwargs, i, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))
    ]
    samples = pick_argument(args, kwargs, 8, "per_sample_weights")
    last = pick_argument(args, kwargs, 9, "include_last_offset", False)
    padding = pick_argument(args, kwargs, 10, "padding_idx")
    plain = most is None and not scaled and mode in ("sum", "mean") and samples is None
    if plain and padding is None and x.dim() in (1, 2):
        site = capture.find_site(weight, EmbeddingBag(weight.shape[0]), TRANSPOSED, None, x)
        if site is not None and sparse:
            capture.leave_alone(site, "its gradient is sparse: a rule's update is not")
        elif site is not None:

            def run(a: Tensor, w: Tensor, b: None) -> Tensor:
                return F.embedding_bag(a, w, offsets, mode=mode, include_last_offset=last)

            def prepare(a: Tensor) -> Tensor:
                eye = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
                return F.embedding_bag(a, eye, offsets, mode=mode, include_last_offset=last)

            return tap(capture, site, run, prepare, x, weight, None)
    return func(*args, **kwargs)


def read_bilinear(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.bilinear(x1, x2, weight, bias)``."""
    names = ("input1", "input2", "weight", "bias")
    x1, x2, weight, bias = (pick_argument(args, kwargs, i, n) for i, n in enumerate(names))
    site = capture.find_site(weight, Bilinear(weight.shape[1]), PLAIN, bias, x1)
    if site is None:
        return func(*args, **kwargs)

    def run(a: Tensor, b2: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return func(a, b2, w, b)

    output = run(x1, x2, *leave_graph(weight, bias))
    box = [output.detach(), _put_side_by_side, ()]
    return apply_tapped(site, run, box, output, weight, bias, x1, x2)


def _put_side_by_side(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.cat([x1, x2], -1)
