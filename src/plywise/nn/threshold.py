"""Threshold: neurons with outputs of 0 or 1, trained by straight-through estimators or exactly."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from plywise._util.checks import require_choice, require_kind, require_positive, require_whole
from plywise.errors import NonFiniteError, PlywiseError

ESTIMATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, slope: torch.ones_like(x),
    "relu": lambda x, slope: (x >= 0).to(x.dtype),
    "leaky_relu": lambda x, slope: torch.where(x >= 0, 1.0, slope).to(x.dtype),
    "clipped_relu": lambda x, slope: ((x >= 0) & (x <= 1)).to(x.dtype),
}
"""The slope used in place of the derivative of the step, which is zero: that of the named activation."""

RIDGE = 1e-13
"""The part of the largest diagonal entry that `lasso` adds to make a singular Gram definite."""


class _Step(torch.autograd.Function):
    """``1{x ≥ 0}`` in forward; in both modes of differentiation, the slope of the estimator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, estimator: str, slope: float) -> Tensor:
        return torch.where(x.isnan(), x, (x >= 0).to(x.dtype))  # a NaN must not become a 0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, float], output: Tensor) -> None:
        x, ctx.estimator, ctx.slope = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ESTIMATORS[ctx.estimator](ctx.saved_tensors[0], ctx.slope), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent * ESTIMATORS[ctx.estimator](ctx.saved_tensors[0], ctx.slope)


class Threshold(nn.Module):
    """An activation with outputs 0 and 1, and a straight-through estimator for its gradient.

    Idea: a step function has a slope of zero, so no gradient passes it. Forward computes the step; backward
        uses the slope of the identity, of a (leaky) ReLU, or of a ReLU clipped at 1.
    Equation: forward s·1{x ≥ 0}; backward G·s·slope(x) with slope(x) = 1 (identity), 1{x ≥ 0} (relu), 1 or
        ``slope`` below 0 (leaky_relu), 1{0 ≤ x ≤ 1} (clipped_relu). The amplitude s is 1, or is trained.
    Use when: activations must be single bits, or you want a baseline for `ThresholdNetwork`.
    Do not use when: activations need not be bits: a ReLU learns better.
    Layers: it replaces an activation, for inputs of any shape.
    Cost: a comparison in forward and a product in backward; it keeps its input until then.
    Status: faithful to the estimators of the paper's code, except that the step at 0 is 1, as in the paper (0
        in its code), and that NaN stays NaN.
    Source: Ergen, Gulluk, Lacotte, Pilanci, "Globally Optimal Training of Neural Networks with Threshold
        Activation Functions", ICLR 2023, arXiv 2303.03382.
    Code: pilancilab/Threshold-networks.
    Results: the paper's results are not reproduced here. On 300 digits with one seed, the objective falls to
        10.7 with clipped_relu, to 28.9 with identity, and to 42.8 with the others
        (examples/plot_threshold.py).
    Limits: the gradient is not that of the loss, so you must try which estimator is best. ``torch.nn`` has
        another Threshold, a ReLU with other constants.

    Args:
        features: number of channels (the second dimension), each with a trained amplitude s that begins at 1;
            None for s = 1. Default None. Range 1 to 4096.
        estimator: "identity", "relu", "leaky_relu" or "clipped_relu". Default "identity".
        slope: the slope of "leaky_relu" below 0. Default 0.01. Range 1e-3 to 0.5.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from plywise.nn import Threshold
        >>> x = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
        >>> y = Threshold(estimator="clipped_relu")(x)
        >>> y
        tensor([0., 1., 1.], grad_fn=<_StepBackward>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([0., 1., 0.])
    """

    def __init__(
        self, features: int | None = None, *, estimator: str = "identity", slope: float = 0.01
    ) -> None:
        super().__init__()
        require_choice(self, "estimator", estimator, tuple(ESTIMATORS))
        require_positive(self, slope=slope)
        if features is not None:
            require_whole(self, features=features)
        self.estimator, self.slope = estimator, slope
        self.amplitude = None if features is None else nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Compute s·1{x ≥ 0}, in the shape of ``x``."""
        step: Tensor = _Step.apply(x, self.estimator, self.slope)
        if self.amplitude is None:
            return step
        return step * self.amplitude.reshape(-1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        """Show the settings."""
        features = "" if self.amplitude is None else f"{len(self.amplitude)}, "
        return f"{features}estimator={self.estimator!r}"


def draw_patterns(
    x: Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``count`` random threshold neurons, and return their distinct outputs on data.

    Args:
        x: inputs (n, d). Centre them and scale them to variance 1, because weights and biases are N(0, 1).
        count: neurons to draw.
        generator: the source of random numbers.

    Returns:
        Patterns (n, P) of zeros and ones, all different; the weights (P, d) and biases (P,) that make them.
    """
    drawn = torch.randn(count, x.shape[1] + 1, generator=generator, dtype=torch.float64, device="cpu").to(x)
    weight, bias = drawn[:, :-1], drawn[:, -1]
    answers = nn.functional.linear(x, weight, bias) >= 0
    patterns, number = torch.unique(answers, dim=1, return_inverse=True)
    order = torch.arange(count, device=x.device)
    first = order.new_full((patterns.shape[1],), count).scatter_reduce(0, number, order, "amin")
    return patterns.to(x), weight[first], bias[first]


def lasso(columns: Tensor, y: Tensor, beta: float) -> Tensor:
    """Compute ``argmin_w ½‖y − Dw‖² + β‖w‖₁`` exactly, by active sets (Lawson and Hanson's, with signs).

    Columns of 0 and 1 are nearly parallel: proximal gradients took over 20,000 steps where this takes a few
    hundred solves, and scikit-learn would be one more dependency. In each round the most correlated column
    enters, the active columns are solved for, and those whose sign would change leave. It ends when no
    correlation is above β.

    Args:
        columns: D (n, P).
        y: targets (n,).
        beta: β, positive.

    Returns:
        w (P,), in float64.

    Raises:
        NonFiniteError: the columns or the targets are not finite.
        ValueError: ``beta`` is not a finite number above 0.
        PlywiseError: rounding keeps the active set from settling.

    Example:
        >>> lasso(torch.eye(2), torch.tensor([3.0, 0.5]), beta=1.0).round(decimals=9)
        tensor([2., 0.], dtype=torch.float64)
    """
    require_positive("lasso", beta=beta)
    columns, y = columns.double(), y.double()
    gram, pulls = columns.T @ columns, columns.T @ y
    if not (gram.isfinite().all() and pulls.isfinite().all()):
        raise NonFiniteError("lasso: the columns or the targets hold a NaN or an infinity.")
    active = torch.zeros(0, dtype=torch.long, device=y.device)
    refused = active  # columns that rounding removed again as soon as they entered
    w = signs = pulls[:0]
    for _ in range(20 * len(pulls) + 20):
        left = pulls - gram[:, active] @ w
        left[torch.cat([active, refused])] = 0
        enter = left.abs().argmax() if len(left) else None
        if enter is None or left[enter].abs() <= beta * (1 + 1e-10):
            return torch.zeros_like(pulls).index_copy_(0, active, w)
        active = torch.cat([active, enter[None]])
        signs, w = torch.cat([signs, left[enter].sign()[None]]), torch.cat([w, w.new_zeros(1)])
        while len(active):
            target = _solve_definite(gram[active[:, None], active], pulls[active] - beta * signs)
            turned = target * signs <= 0
            if not turned.any():
                w, refused = target, refused[:0]
                break
            ways = torch.where(turned, w / (w - target), math.inf)
            way = ways.min()  # how far to go until the first weight is zero
            keep = ways > way
            if way == 0 and not keep[-1]:
                refused = torch.cat([refused, enter[None]])
            active, signs, w = active[keep], signs[keep], (w + way * (target - w))[keep]
    raise PlywiseError(
        f"lasso: the active set did not settle over {len(pulls)} columns at beta = {beta:g}. A larger beta "
        "or fewer columns make the problem better determined."
    )


def _solve_definite(gram: Tensor, right: Tensor) -> Tensor:
    """Compute ``gram⁻¹ right``, very large in null directions, so that a weight crosses zero."""
    ridge = RIDGE * gram.diagonal().max()
    while True:
        factor, failed = torch.linalg.cholesky_ex(
            gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        if not failed:
            return torch.cholesky_solve(right[:, None], factor)[:, 0]
        ridge = ridge * 100


def find_shattered_optimum(y: Tensor, beta: float) -> Tensor:
    """Find ``argmin_δ ½‖δ − y‖² + β(max(δ)₊ + max(−δ)₊)``, the outputs of the best three-layer network.

    y is clipped above at the c where ``Σ(y − c)₊ = β`` (at 0 if no c above 0 satisfies this), and likewise
    below.

    Args:
        y: targets (n,).
        beta: β, positive.

    Raises:
        ValueError: ``beta`` is not a finite number above 0.

    Example:
        >>> find_shattered_optimum(torch.tensor([3.0, 2.0, -2.5]), beta=1.0)
        tensor([ 2.0000,  2.0000, -1.5000])
    """
    require_positive("find_shattered_optimum", beta=beta)
    return y.clamp(-_find_level(-y, beta), _find_level(y, beta))


def _find_level(y: Tensor, beta: float) -> Tensor:
    """Find the c of the upper side: each sum of the k largest gives a bound, and c is the largest bound."""
    falling = y.sort(descending=True).values
    counts = torch.arange(1, len(y) + 1, device=y.device)
    return ((falling.cumsum(0) - beta) / counts).max().clamp_min(0)


def split_into_steps(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Split numbers into steps: patterns (n, K) of 0 and 1 and heights (K,) with ``δ = patterns @ heights``.

    There is one step for each value except 0, and ``‖heights‖₁ = max(δ)₊ + max(−δ)₊``.

    Example:
        >>> split_into_steps(torch.tensor([3.0, 1.0, -2.0]))
        (tensor([[1., 1., 0.],
                [1., 0., 0.],
                [0., 0., 1.]]), tensor([ 1.,  2., -2.]))
    """
    patterns, heights = [], []
    for side in (1, -1):
        levels = (side * delta).clamp_min(0).unique()
        levels = levels[levels > 0]
        patterns.append((side * delta)[:, None] >= levels)
        heights.append(side * levels.diff(prepend=levels.new_zeros(1)))
    return torch.cat(patterns, 1).to(delta), torch.cat(heights)


class ThresholdNetwork:
    """A network of random threshold neurons at the global optimum of its regularised loss.

    Idea: of a threshold neuron only its pattern of zeros and ones on the data matters. So two layers with
        weight decay are a LASSO over patterns. With three layers, if the first one distinguishes all samples,
        the optimum clips the targets.
    Equation: two layers: min_w ½‖y − D w‖² + β‖w‖₁, columns of D the patterns 1{X u + b ≥ 0} of random
        neurons. Three layers: min_δ ½‖δ − y‖² + β(max(δ)₊ + max(−δ)₊); each step between two values of δ
        is a neuron of the second layer, by least squares on the first one's patterns D.
    Use when: there are few data, and you need the optimum to measure what training by gradients misses.
    Do not use when: there are more than a few thousand samples, or the test error counts.
    Layers: it makes its own network of Linear, Threshold, Linear; with three layers there is one more pair.
    Cost: P²n/2 products for a Gram of P patterns; then, for each output, one solve of k³/3 or more for each
        of k active neurons. With three layers, one least-squares problem, n²P.
    Status: variant: an exact active-set solver in place of cvxpy with MOSEK; a bias in each hidden neuron
        in place of a column of ones; the closed form in place of a solver, and a threshold at ½ in the
        second layer (its code tries 0 and ½).
    Source: Ergen, Gulluk, Lacotte, Pilanci, "Globally Optimal Training of Neural Networks with Threshold
        Activation Functions", ICLR 2023, arXiv 2303.03382.
    Code: pilancilab/Threshold-networks.
    Results: the paper's are not reproduced here. On 300 digits the objective is 24.7 with two layers, 4.0
        with three, and 10.7 to 42.9 with the four estimators (examples/plot_threshold.py).
    Limits: it is the optimum over the drawn patterns only, so a network that trains its neurons may be
        better, as one of the four estimators is there. With two layers outputs do not share neurons for
        sparsity. Inputs far from mean 0 and variance 1 give few patterns.

    Args:
        beta: β, the strength of the penalty on large weights. Default 1.0. Range 1e-3 to 100.
        layers: 2 or 3. Default 2. Range 2 to 3.
        patterns: neurons to draw for the first layer. Default 2000. Range 100 to 10000.
        seed: the seed of the random neurons. Default 0.

    Attributes:
        network: after `fit`, the network, an ordinary ``nn.Sequential`` in float64.
        objective: after `fit`, the optimum, summed over outputs.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from plywise.nn import ThresholdNetwork
        >>> x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        >>> xor = torch.tensor([-1.0, 1.0, 1.0, -1.0])
        >>> fit = ThresholdNetwork(beta=0.01, patterns=100).fit(x, xor)
        >>> fit.predict(x).sign()
        tensor([-1.,  1.,  1., -1.])
    """

    network: nn.Sequential
    objective: float

    def __init__(self, beta: float = 1.0, *, layers: int = 2, patterns: int = 2000, seed: int = 0) -> None:
        require_positive(self, beta=beta)
        require_whole(self, patterns=patterns)
        if layers not in _FITS:
            raise ValueError(f"ThresholdNetwork: layers must be 2 or 3, not {layers!r}.")
        self.beta, self.layers, self.patterns, self.seed = beta, layers, patterns, seed

    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Find the optimum.

        Args:
            x: inputs (n, d).
            y: targets (n,), or (n, C) for C outputs: numbers, or ±1 for classes.

        Raises:
            NonFiniteError: inputs or targets are not finite.
            PlywiseError: shapes do not fit; or, with three layers, the drawn neurons do not distinguish all
                samples.
        """
        for name, tensor in (("x", x), ("y", y)):
            require_kind(self, name, tensor, Tensor, "a tensor")
        if x.dim() != 2 or y.dim() not in (1, 2) or len(x) != len(y) or len(x) == 0:
            raise PlywiseError(
                f"ThresholdNetwork needs inputs (n, d) and targets (n,) or (n, C), not {tuple(x.shape)} and "
                f"{tuple(y.shape)}."
            )
        if not (x.isfinite().all() and y.isfinite().all()):
            raise NonFiniteError("ThresholdNetwork: inputs or targets hold a NaN or an infinity.")
        self._flat = y.dim() == 1
        generator = torch.Generator().manual_seed(self.seed)
        neurons = draw_patterns(x.double(), self.patterns, generator)
        self.network, self.objective = _FITS[self.layers](*neurons, y.reshape(len(y), -1).double(), self.beta)
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Compute outputs (n,), or (n, C) if the targets had this shape, in the dtype of ``x``.

        Raises:
            PlywiseError: `fit` has not been called.
        """
        if not hasattr(self, "network"):
            raise PlywiseError("ThresholdNetwork has no network yet: call fit(x, y) before predict(x).")
        outputs = self.network(x.double()).to(x.dtype)
        return outputs[:, 0] if self._flat else outputs


Fit = tuple[nn.Sequential, float]


def fit_two_layers(patterns: Tensor, weight: Tensor, bias: Tensor, y: Tensor, beta: float) -> Fit:
    """Find the best network of the given hidden neurons for targets (n, C), and its objective."""
    w = torch.stack([lasso(patterns, column, beta) for column in y.T])
    objective = (y - patterns @ w.T).square().sum() / 2 + beta * w.abs().sum()
    used = w.any(0)
    used[0] |= not used.any()  # a network that is zero needs a neuron too
    network = nn.Sequential(_connect(weight[used], bias[used]), Threshold(), _connect(w[:, used]))
    return network, float(objective)


def fit_three_layers(patterns: Tensor, weight: Tensor, bias: Tensor, y: Tensor, beta: float) -> Fit:
    """Find the best network on a given first layer that distinguishes all samples, and its objective."""
    delta = torch.stack([find_shattered_optimum(column, beta) for column in y.T], 1)
    stairs = [split_into_steps(column) for column in delta.T]
    wanted = torch.cat([steps for steps, _ in stairs], 1)
    heights = torch.block_diag(*[own[None] for _, own in stairs])
    if not len(wanted.T):  # a network that is zero needs a neuron too
        wanted, heights = torch.zeros_like(y[:, :1]), torch.zeros_like(y[:1].T)
    second = torch.linalg.lstsq(patterns.cpu(), wanted.cpu(), driver="gelsd").solution.to(patterns)
    if not torch.equal(patterns @ second >= 0.5, wanted.bool()):
        raise PlywiseError(
            f"ThresholdNetwork: {patterns.shape[1]} different patterns do not tell {len(y)} samples apart. "
            "Draw more (patterns=...), centre and scale the inputs, and look for equal inputs with different "
            "targets."
        )
    objective = (y - delta).square().sum() / 2 + beta * heights.abs().sum()
    half = second.new_full((second.shape[1],), -0.5)
    layers = _connect(weight, bias), Threshold(), _connect(second.T, half), Threshold(), _connect(heights)
    return nn.Sequential(*layers), float(objective)


_FITS = {2: fit_two_layers, 3: fit_three_layers}


def _connect(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return layer
