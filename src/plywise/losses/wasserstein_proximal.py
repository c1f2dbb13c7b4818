"""wasserstein_proximal: a penalty on how far a step of a generator moves its samples."""

from torch import Tensor

from plywise._util.checks import require_kind, require_positive


def wasserstein_proximal(samples: Tensor, anchor: Tensor, step: float = 0.1) -> Tensor:
    """The relaxed Wasserstein-2 proximal penalty between a generator's samples before an update and now.

    Idea: let each update of a generator minimise its loss plus the squared distance by which the distribution
        of its samples moves. The distance is measured between samples, not between weights. Using the same
        noise before and after the update is one possible transport plan, so its cost bounds the true distance
        from above. This cost is the mean squared distance between the samples from the same noise vector now
        and before the update.
    Equation: loss = F(g(z)) + E‖g(z) - g_before(z)‖² / (2 · step): after each step of the critic, hold
        anchor = g(z) and minimise over the weights of g for some inner steps with the same z.
    Use when: the generator of a GAN changes too fast for its critic; or an inner loop changes a network whose
        outputs should stay close to what they were, as with a trust region or self-distillation.
    Do not use when: the squared distance of two outputs has no meaning, as with token numbers.
    Layers: any network whose outputs are numbers; the whole generator.
    Cost: one product of the size of the samples. With the same z in all inner steps the anchor is one
        forward; with fresh z it is one more forward of a copy in each inner step.
    Status: after. The penalty is the authors' relaxed one. The paper does not describe in enough detail what
        is held fixed, whether z is fresh or fixed, the number of inner steps and the step. The authors'
        semi-backward variant is not implemented.
    Source: Lin, Li, Osher, Montúfar, "Wasserstein Proximal of GANs", Geometric Science of Information, 2021
        (arXiv 2102.06862).
    Code: none found.
    Results: the paper reports faster training by wall-clock and a better FID on images; not reproduced here:
        the networks, also that of the FID, are too large for us. Ours: the closed forms in
        tests/losses/test_wasserstein_proximal.py, and a GAN on digits, examples/plot_wasserstein_proximal.py.
    Limits: it bounds the exact W2² from above. It is above 0 if samples move, even if the distribution stays
        the same. Keep batch norm and dropout fixed during the inner steps.

    Args:
        samples: the output of the generator for noise z, (N, ...).
        anchor: its output for the same z before the update, (N, ...). No gradient flows into it.
        step: h, the proximal step. A larger step penalises less. A small one gives the natural gradient step
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
    require_positive("wasserstein_proximal", step=step)
    for name, tensor in (("samples", samples), ("anchor", anchor)):
        require_kind("wasserstein_proximal", name, tensor, Tensor, "a tensor")
    if samples.shape != anchor.shape or samples.dim() == 0 or len(samples) == 0:
        raise ValueError(
            "wasserstein_proximal: samples and anchor must have one shape (N, ...) with N above 0, not "
            f"{tuple(samples.shape)} and {tuple(anchor.shape)}: both come from the same noise."
        )
    return (samples - anchor.detach()).square().sum() / (2 * step * len(samples))
