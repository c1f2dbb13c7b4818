"""wasserstein_proximal: a generator's step measured by how far its samples move."""

import math

from torch import Tensor


def wasserstein_proximal(samples: Tensor, anchor: Tensor, step: float = 0.1) -> Tensor:
    """The relaxed Wasserstein-2 proximal penalty between a generator's samples now and before.

    Idea: let each update of a generator minimise its loss plus the squared distance that the distribution of
        its samples moves, in the space of samples instead of that of weights. The same noise through both
        generators is one transport plan, so that its cost is at most too high: the mean squared distance
        between what the generator makes of a noise vector now and what it made of it before the update.
    Equation: loss = F(g(z)) + E‖g(z) - g_before(z)‖² / (2 · step): after each step of the critic, hold
        anchor = g(z) and minimise over the weights of g for some inner steps with the same z.
    Use when: a GAN's generator runs away from its critic; or any network is to be changed by an inner loop
        without moving far in what it computes, as by a trust region or a distillation of its former self.
    Do not use when: outputs mean nothing by their squared distance, as token numbers do.
    Layers: any network whose outputs are numbers; of a generator, the whole.
    Cost: one product of the size of the samples. With the same z in all inner steps the anchor is one
        forward; with fresh z it is one more forward of a copy in each inner step.
    Status: after. The penalty is the authors' relaxed one; what is held fixed, fresh or fixed z, the number
        of inner steps and the step are not public in enough detail. Their semi-backward variant is not here.
    Source: Lin, Li, Osher, Montúfar, "Wasserstein Proximal of GANs", Geometric Science of Information, 2021
        (arXiv 2102.06862).
    Code: none found.
    Results: the paper reports faster training by wall-clock and a better FID on images; not reproduced here:
        its networks and the FID's are out of reach. Ours: the closed forms in
        tests/losses/test_wasserstein_proximal.py, and a GAN on digits, examples/plot_wasserstein_proximal.py.
    Limits: it bounds the exact W2² from above and is 0 only where no sample moves, even if the
        distribution stays. Hold layers that compute by the batch (batch norm) and dropout as they were.

    Args:
        samples: what the generator makes of noise z, (N, ...).
        anchor: what it made of the same z before the update, (N, ...); no gradient goes to it.
        step: h, the proximal step: the larger, the freer. Small ones give the natural gradient step
            -h E[JᵀJ]⁻¹∇F, J the Jacobian of the samples by the weights. Default 0.1. Range 0.01 to 10.

    Returns:
        The penalty, a scalar: the mean over samples of the squared distance over 2h.

    Raises:
        ValueError: the step is not a finite number above 0, or the samples do not match.

    Example:
        >>> import torch
        >>> from plywise.losses import wasserstein_proximal
        >>> generator = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(generator.parameters(), lr=0.01)
        >>> z = torch.randn(16, 2)
        >>> anchor = generator(z).detach()
        >>> for _ in range(5):
        ...     samples = generator(z)
        ...     loss = samples.square().mean() + wasserstein_proximal(samples, anchor, step=0.1)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
        raise ValueError(f"wasserstein_proximal: step must be a finite number above 0, not {step!r}.")
    if samples.shape != anchor.shape or samples.dim() == 0 or len(samples) == 0:
        raise ValueError(
            "wasserstein_proximal: samples and anchor must be of one shape (N, ...) with N above 0, not "
            f"{tuple(samples.shape)} and {tuple(anchor.shape)}: both come from the same noise."
        )
    return (samples - anchor.detach()).square().sum() / (2 * step * len(samples))
