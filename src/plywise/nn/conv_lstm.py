"""ConvLSTM: an LSTM whose state is an image and whose gates are convolutions."""

import torch
from torch import Tensor, nn

from plywise._util.checks import require_whole

State = tuple[Tensor, Tensor]
"""Hidden images and cells, both (N, features, H, W)."""


class ConvLSTM(nn.Module):
    """A convolutional LSTM layer for sequences of images.

    Idea: motion in an image follows the same laws everywhere. So the products in the gates of an LSTM become
        convolutions, and its state has a value for each pixel.
    Equation: [i, f, g, o] = W * [x, h] + b; c ← σ(f) c + σ(i) tanh(g); h ← σ(o) tanh(c), where * is a
        convolution with zero padding.
    Use when: you predict the next image of a sequence from those before, such as rain, traffic or video.
    Do not use when: the laws differ from place to place, or a sequence has no spatial structure: use
        `torch.nn.LSTM`.
    Layers: it is a layer itself. To stack several, pass the outputs of one to the next.
    Cost: one k×k convolution C + F → 4F for each image. Training keeps 4F + 2F images for each time step.
    Status: variant. It has no peepholes (weights from the cell to the gates, one for each pixel), which would
        fix the size of the image, and the bias of the forget gate begins at 1.
    Source: Shi, Chen, Wang, Yeung, Wong, Woo, "Convolutional LSTM Network: A Machine Learning Approach for
        Precipitation Nowcasting", NeurIPS, 2015 (arXiv 1506.04214).
    Code: none found.
    Results: not reproduced here, because the paper's radar data are not available to us. Ours, on the next
        images of moving digits, are printed by examples/plot_conv_lstm.py.
    Limits: kernels have an odd size. It cannot follow motion that is faster than half a kernel in a time
        step.

    Args:
        channels: C, the channels of the images. Range 1 to 16.
        features: F, the channels of the state. Range 8 to 128.
        kernel_size: k, odd. Default 3. Range 3 to 7.

    Raises:
        ValueError: an argument is not a whole number above 0, the size of the kernel is even, or images do
            not have the shape (T, N, C, H, W).

    Example:
        >>> import torch
        >>> from plywise.nn import ConvLSTM
        >>> layer = ConvLSTM(1, 8)
        >>> outputs, (h, c) = layer(torch.randn(6, 2, 1, 16, 16))
        >>> outputs.shape, torch.equal(outputs[-1], h)
        (torch.Size([6, 2, 8, 16, 16]), True)
    """

    def __init__(self, channels: int, features: int, kernel_size: int = 3) -> None:
        super().__init__()
        require_whole(self, channels=channels, features=features, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"ConvLSTM: kernel_size must be odd, not {kernel_size!r}.")
        self.channels, self.features = channels, features
        self.gates = nn.Conv2d(channels + features, 4 * features, kernel_size, padding=kernel_size // 2)
        assert self.gates.bias is not None
        with torch.no_grad():
            self.gates.bias[features : 2 * features].fill_(1.0)

    def cell(self, image: Tensor, state: State) -> State:
        """Compute one time step: the state after, from images (N, C, H, W) and the state before."""
        h, c = state
        i, f, g, o = self.gates(torch.cat([image, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def forward(self, images: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a sequence.

        Args:
            images: (T, N, C, H, W).
            state: the state after an earlier part of the sequence. Default zeros.

        Returns:
            The hidden images of all steps (T, N, features, H, W), and the state after the last.
        """
        if images.dim() != 5 or images.shape[2] != self.channels or len(images) == 0:
            raise ValueError(
                f"ConvLSTM: images must be of (T, N, {self.channels}, H, W) with T above 0, not "
                f"{tuple(images.shape)}."
            )
        if state is None:
            zeros = images.new_zeros(images.shape[1], self.features, *images.shape[3:])
            state = zeros, zeros
        hidden = []
        for image in images:
            state = self.cell(image, state)
            hidden.append(state[0])
        return torch.stack(hidden), state
