"""Maps of Associated Learning's components, as factories: bridges, target encoders, decoders.

The three maps of a component must have matching ranges: a bridge or decoder that ends in a sigmoid cannot
reach the codes of a tanh. `check_ranges` raises an error when the learner is made.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from plywise.errors import BlockError
from plywise.local.associated_networks import he_normal_

MakeBridge = Callable[[torch.Size, int], nn.Module]
"""Makes a bridge from the shape of a sample's activations and the code's width."""
MakeEncoder = Callable[[Tensor, int], nn.Module]
"""Makes a target encoder from the codes that it gets to begin with, (C, below), and its own codes' width."""
MakeDecoder = Callable[[Tensor, Tensor], nn.Module]
"""Makes a decoder from the codes that it gets to begin with, (C, code), and what it rebuilds, (C, below)."""
Range = tuple[float, float]


def wide_bridge(shape: torch.Size, code: int) -> nn.Module:
    """The paper's bridge: two sigmoid layers, the first five times as wide as the code; `he_normal_`."""
    layers = (nn.Linear(shape.numel(), 5 * code), nn.Sigmoid(), nn.Linear(5 * code, code), nn.Sigmoid())
    return he_normal_(nn.Sequential(nn.Flatten(), *layers))


def pooled_bridge(shape: torch.Size, code: int) -> nn.Module:
    """`wide_bridge` behind pooling to at most 4×4 positions, for images: a fraction of its cost.

    The two layers stay, since one alone costs accuracy.
    """
    if len(shape) != 3:
        return wide_bridge(shape, code)
    size = (min(shape[1], 4), min(shape[2], 4))
    return nn.Sequential(nn.AdaptiveAvgPool2d(size), wide_bridge(torch.Size((shape[0], *size)), code))


def paper_encoder(codes: Tensor, width: int) -> nn.Module:
    """Return the paper's target encoder: a sigmoid layer, `he_normal_`.

    Args:
        codes: what it gets to begin with, a row for each class, (C, below).
        width: of its own codes.
    """
    return he_normal_(nn.Sequential(nn.Linear(codes.shape[1], width), nn.Sigmoid()))


def apart_encoder(codes: Tensor, width: int) -> nn.Module:
    """`paper_encoder`, shifted and scaled so that the codes of classes differ from the start, at any depth.

    At the start, the paper's sigmoid layers shrink the differences between classes to a third, so that a deep
    component needs hundreds of steps until its codes separate the classes. Here the inputs of the sigmoid
    have mean 0 and mean square 1 over classes.

    Example:
        >>> encoder = apart_encoder(torch.eye(10), 64)
        >>> round(encoder[0](torch.eye(10)).square().mean().item(), 4)
        1.0
    """
    encoder = paper_encoder(codes, width)
    layer = encoder.get_submodule("0")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        middle = codes.mean(0)
        square = (layer(codes) - layer(middle)).square().mean()
        if square > 0:  # there are several classes
            layer.weight /= square.sqrt()
            layer.bias.copy_(-layer.weight @ middle)
    return encoder


def sigmoid_decoder(codes: Tensor, below: Tensor) -> nn.Module:
    """Return the paper's decoder: a sigmoid layer, `he_normal_`.

    Args:
        codes: what it gets to begin with, a row for each class, (C, code).
        below: what it has to rebuild of them, (C, below).
    """
    return he_normal_(nn.Sequential(nn.Linear(codes.shape[1], below.shape[1]), nn.Sigmoid()))


def mean_decoder(codes: Tensor, below: Tensor) -> nn.Module:
    """`sigmoid_decoder`, shifted so that it makes the mean of what it has to rebuild from the mean code.

    The paper's decoders begin around ½ for every class, where the mean of C classes is 1/C. So they first
    learn that no class is likely, and in these steps all classes look alike to the decoders. This one begins
    there: in short training components learn several times as early.

    Example:
        >>> codes, classes = torch.rand(10, 64), torch.eye(10)
        >>> decoder = mean_decoder(codes, classes)
        >>> round(decoder(codes.mean(0)).mean().item(), 4)
        0.1
    """
    decoder = sigmoid_decoder(codes, below)
    layer = decoder.get_submodule("0")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.bias.copy_(below.mean(0).logit(eps=1e-3) - layer.weight @ codes.mean(0))
    return decoder


def linear_decoder(codes: Tensor, below: Tensor) -> nn.Module:
    """Return a linear layer: for targets that are any numbers."""
    return nn.Linear(codes.shape[1], below.shape[1])


def tanh_bridge(shape: torch.Size, code: int) -> nn.Module:
    """Return a linear layer without bias and tanh, as in the authors' code for text."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), code, bias=False), nn.Tanh())


def tanh_encoder(codes: Tensor, width: int) -> nn.Module:
    """Return a linear layer without bias and tanh, as in the authors' code for text."""
    return nn.Sequential(nn.Linear(codes.shape[1], width, bias=False), nn.Tanh())


def tanh_decoder(codes: Tensor, below: Tensor) -> nn.Module:
    """Return a linear layer without bias and tanh, as in the authors' code for text."""
    return nn.Sequential(nn.Linear(codes.shape[1], below.shape[1], bias=False), nn.Tanh())


def find_output_range(module: nn.Module) -> Range | None:
    """Return the range of a map's outputs, from its last module; None if that is unknown.

    Example:
        >>> find_output_range(nn.Tanh()), find_output_range(nn.Linear(4, 2))
        ((-1.0, 1.0), (-inf, inf))
    """
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    if isinstance(module, nn.Linear):
        return -torch.inf, torch.inf
    if any(True for _ in module.parameters()):
        return None
    far = torch.linspace(-1e4, 1e4, 2001, device="cpu").view(1, -1)
    try:
        found = module(far)
    except Exception:  # what it ends in wants another input
        return None
    if found.shape != far.shape:  # it does more than look at each number
        return None
    low, high = (float(end) for end in found.aminmax())
    return (low if low > -1e3 else -torch.inf), (high if high < 1e3 else torch.inf)


def check_ranges(
    number: int, bridge: nn.Module, encoder: nn.Module, decoder: nn.Module, below: Range | None
) -> None:
    """Raise BlockError if a component's bridge cannot meet its codes, or its decoder what it has to rebuild.

    Args:
        number: of the component.
        bridge: its bridge.
        encoder: its target encoder.
        decoder: its decoder.
        below: the range of what the encoder gets.
    """
    codes = find_output_range(encoder)
    for name, maker, wanted in (("bridge", bridge, codes), ("decoder", decoder, below)):
        found = find_output_range(maker)
        if found is None or wanted is None or (found[0] <= wanted[0] + 1e-3 and wanted[1] - 1e-3 <= found[1]):
            continue
        raise BlockError(
            f"The {name} of component {number} makes numbers in {_format_range(found)}, but its "
            f"targets lie in {_format_range(wanted)}. Give a {name} of the encoder's kind: sigmoid, tanh "
            "or linear, all three."
        )


def _format_range(ends: Range) -> str:
    return " … ".join(f"{end:.3g}" for end in ends)
