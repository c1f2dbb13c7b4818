"""SOAP: Adam in the eigenbases of Shampoo, for all matrices of one shape at once."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise._util.checks import require_whole
from plywise.optim.plain import Group
from plywise.optim.stacked import Shape, Stack, StackedOptimizer, compute_adam_step

Rows = slice
"""The parameters of a stack that are refreshed: all of them, or one."""


class SOAP(StackedOptimizer):
    """Adam in the eigenbases of the gradient's second moments on both sides of a weight.

    Idea: Adam treats each weight separately, so it depends on the axes. In the eigenbases of G Gᵀ and Gᵀ G
        the entries of the gradient are nearly uncorrelated, and Adam does there what Shampoo does with matrix
        roots. The bases change slowly, so an occasional step of power iteration is enough to follow them.
    Equation: L ← β L + (1 − β) G Gᵀ, R ← β R + (1 − β) Gᵀ G; X = Q_Lᵀ G Q_R, D = Adam's step for X; W ← (1 −
        lr weight_decay)(W − lr Q_L D Q_Rᵀ); every ``precondition_frequency`` steps Q = qr(L Q), its columns
        sorted by diag(Qᵀ L Q), likewise for R, and the momentum is turned into the new bases.
    Use when: forward and backward cost more than some matrix products of the size of the weights.
    Do not use when: layers are wide and batches small: then a step costs as much as several plain steps.
    Layers: parameters of two or more dimensions, with a basis for each dimension of size at most
        ``max_precondition_dim``. Other parameters move by Adam.
    Cost: six products of a weight with its sides in each step, or three with ``one_sided``; four more
        matrices of the sizes of the sides; a QR of each side every ``precondition_frequency`` steps. Each
        function is called once for all weights of a shape. There is no host synchronisation after the first
        step, which has an eigh.
    Status: faithful to the authors' code, with the same numbers in float64: the first step only begins the
        statistics, ε is added before Adam's bias correction, and decay comes after the step. Momentum is kept
        in the bases and turned together with them, which is equivalent. With ``stagger`` it is a variant.
    Source: Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024 (arXiv 2409.11321).
    Code: nikhilvyas/SOAP.
    Results: the paper's language models are not reproduced here. On small networks a step costs the same as
        in the package pytorch_optimizer, within noise: benchmarks/peers_cost.py.
    Limits: all sides are refreshed in the same step, unless ``stagger`` is on. The first step has an eigh of
        every side. The state has the dtype of the weights. DTensors are not supported.

    Args:
        params: parameters or parameter groups.
        lr: learning rate. Default 3e-3. Range 1e-4 to 0.1.
        betas: Adam's decay rates. Default (0.95, 0.95).
        shampoo_beta: β of L and R. None: the second of ``betas``.
        eps: added to the root of the second moment. Default 1e-8. Range 1e-12 to 1e-4.
        weight_decay: decoupled. Default 0.01. Range 0 to 1.
        precondition_frequency: steps between new bases. Default 10. Range 1 to 100.
        max_precondition_dim: dimensions above it have no basis. Default 10000. Range 64 to 10000.
        one_sided: a basis only for the smaller of a weight's first two dimensions. Default False.
        stagger: refresh sides in different steps of a cycle, the largest first, so that no step refreshes
            all. Numbers then differ from the paper's: each basis is refreshed as often, but in other steps.
            Default False.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import SOAP
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [-2.0, 1.0]]))
        >>> optimizer = SOAP([weight], lr=0.05)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight.abs().max().item() < 0.3
        True
    """

    ordered = True
    """Whether a refresh sorts the columns of the bases."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        *,
        one_sided: bool = False,
        stagger: bool = False,
        maximize: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        bases = {"shampoo_beta": shampoo_beta, "precondition_frequency": precondition_frequency}
        sides = {"max_precondition_dim": max_precondition_dim, "one_sided": one_sided, "stagger": stagger}
        super().__init__(params, {**adam, **bases, **sides, "maximize": maximize})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        for name in ("lr", "eps", "weight_decay"):
            self.require_range(name, group[name], 0, math.inf)
        self.require_pair("betas", group["betas"])
        self.require_range("shampoo_beta", get_decay(group), 0, 1)
        for name in ("precondition_frequency", "max_precondition_dim"):
            require_whole(self, **{name: group[name]})

    def get_shapes(self, group: Group, param: Tensor) -> Mapping[str, Shape] | None:
        """Return the shapes of Adam's moments, and of statistics and basis of every side that has them."""
        own = tuple(param.shape)
        sides = choose_sides(group, own) if param.numel() else []
        if not sides:
            return None
        squares = {f"{name}_{side}": (own[side],) * 2 for name in ("gram", "basis") for side in sides}
        return {"exp_avg": own, "exp_avg_sq": own, **squares}

    def arrange(self, group: Group, stacks: list[Stack]) -> None:
        """Assign each side a step of the cycle, by the sizes of all sides of the group."""
        cycle = group["precondition_frequency"] if group["stagger"] else 1
        shapes = [(id(param), tuple(param.shape)) for param in group["params"]]
        sides = [(-shape[side], key, side) for key, shape in shapes for side in choose_sides(group, shape)]
        sides.sort(key=lambda side: side[0])
        turns = {(key, side): place % cycle for place, (_, key, side) in enumerate(sides)}
        for stack in stacks:
            if not stack.flat:
                own = choose_sides(group, stack.shape)
                stack.turns = {side: [turns[id(param), side] for param in stack.params] for side in own}

    def advance(self, group: Group, stack: Stack, gradient: Tensor) -> None:
        """Take a step in the bases; the first step only begins them."""
        step = stack.step - 1
        if step == 0:
            if not stack.flat:
                self.begin(group, stack, gradient)
            return
        inside = gradient if stack.flat else turn(gradient, stack)
        update = self.compute_step(group, stack, inside, step)
        lr = float(group["lr"])
        stack.add(update if stack.flat else turn(update, stack, back=True), -lr)
        stack.shrink(lr, group["weight_decay"])
        if not stack.flat:
            self.learn(group, stack, gradient, inside)

    def compute_step(self, group: Group, stack: Stack, inside: Tensor, step: int) -> Tensor:
        """Compute the step at rate 1, from a gradient in the bases or of parameters without bases."""
        correction = math.sqrt(1 - group["betas"][1] ** step)
        return compute_adam_step(stack.state, inside, group["betas"], group["eps"] / correction, step)

    def begin(self, group: Group, stack: Stack, gradient: Tensor) -> None:
        """Compute the first statistics, and their eigenvectors."""
        self.learn(group, stack, gradient, gradient)
        for side in stack.turns:
            stack.state[f"basis_{side}"].copy_(find_eigenvectors(stack.state[f"gram_{side}"]))

    def learn(self, group: Group, stack: Stack, gradient: Tensor, inside: Tensor) -> None:
        """Update the statistics of all sides; ``inside`` is the gradient in the bases."""
        decay = get_decay(group)
        for side in stack.turns:
            rows = gradient.movedim(side + 1, 1).flatten(2)
            stack.state[f"gram_{side}"].baddbmm_(rows, rows.mT, beta=decay, alpha=1 - decay)

    def finish(self, group: Group, stacks: list[Stack]) -> None:
        """Refresh the bases that are due in this step, all of one size at once."""
        due: dict[tuple[int, torch.dtype, torch.device], list[tuple[Stack, int, Rows]]] = defaultdict(list)
        for stack in stacks:
            for side, turns in stack.turns.items():
                first = stack.params[0]
                where = (stack.shape[side], first.dtype, first.device)
                frequency = group["precondition_frequency"]
                due[where] += [(stack, side, rows) for rows in find_due(stack.step - 1, frequency, turns)]
        for sides in due.values():
            if sides:
                renew(sides, self.ordered)


def get_decay(group: Group) -> float:
    """Return β of the statistics."""
    decay = group["shampoo_beta"]
    return group["betas"][1] if decay is None else decay


def choose_sides(group: Group, shape: Shape) -> list[int]:
    """Choose the dimensions of a parameter that get a basis; those of size 1 need none.

    Example:
        >>> choose_sides({"max_precondition_dim": 100, "one_sided": False}, (64, 32, 1, 200))
        [0, 1]
        >>> choose_sides({"max_precondition_dim": 100, "one_sided": True}, (64, 32, 3, 3))
        [1]
    """
    sides = [side for side, size in enumerate(shape) if 1 < size <= group["max_precondition_dim"]]
    if len(shape) < 2:
        return []
    if group["one_sided"]:
        return sorted((side for side in sides if side < 2), key=lambda side: shape[side])[:1]
    return sides


def turn(stacked: Tensor, stack: Stack, back: bool = False) -> Tensor:
    """Turn ``stacked``, (k, *shape), from the axes of the parameters into the bases, or ``back``.

    Each round moves the first dimension to the end, so all are in place again after the last round.
    """
    x = stacked
    for side, size in enumerate(stack.shape):
        x = x.reshape(len(stacked), size, -1).mT
        if side in stack.turns:
            basis = stack.state[f"basis_{side}"]
            x = torch.bmm(x, basis.mT if back else basis)
    return x.reshape(stacked.shape)


def find_eigenvectors(grams: Tensor) -> Tensor:
    """Find the eigenvectors of (k, n, n) symmetric matrices, in columns, the largest eigenvalue first."""
    wide = grams.to(torch.promote_types(grams.dtype, torch.float32))
    try:
        vectors = torch.linalg.eigh(wide).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of float32 with many equal eigenvalues
        vectors = torch.linalg.eigh(wide.double()).eigenvectors
    return vectors.flip(2)


def find_due(step: int, frequency: int, turns: Sequence[int]) -> list[Rows]:
    """Find the parameters to refresh: all of them as one slice, or a slice for each.

    Example:
        >>> find_due(10, 10, [0, 0]), find_due(9, 10, [0, 1]), find_due(0, 10, [0, 0])
        ([slice(None, None, None)], [slice(1, 2, None)], [])
    """
    if step == 0:
        return []
    due = [row for row, turn in enumerate(turns) if (step + turn) % frequency == 0]
    return [slice(None)] if len(due) == len(turns) else [slice(row, row + 1) for row in due]


def renew(sides: Sequence[tuple[Stack, int, Rows]], ordered: bool) -> None:
    """Refresh bases of one size by a step of power iteration, and turn the momentum into them."""
    grams, old = (
        torch.cat([stack.state[f"{name}_{side}"][rows] for stack, side, rows in sides])
        for name in ("gram", "basis")
    )
    new, order = iterate(grams, old, ordered)
    place = 0
    for stack, side, rows in sides:
        basis = stack.state[f"basis_{side}"][rows]
        mine = slice(place, place + len(basis))
        place = mine.stop
        basis.copy_(new[mine])
        turned = torch.bmm(old[mine].mT, new[mine].to(old.dtype))
        mean = stack.state["exp_avg"][rows].movedim(side + 1, -1)
        mean.copy_(torch.bmm(mean.flatten(1, -2), turned).view_as(mean))
        if order is not None:
            square = stack.state["exp_avg_sq"][rows].movedim(side + 1, -1)
            columns = order[mine].view(-1, *[1] * (square.dim() - 2), square.shape[-1])
            square.copy_(square.take_along_dim(columns, -1))


def iterate(grams: Tensor, bases: Tensor, ordered: bool = True) -> tuple[Tensor, Tensor | None]:
    """Compute ``qr(gram @ basis)``, with columns sorted by eigenvalue if ``ordered``, and the order, (k, n).

    Example:
        >>> gram = torch.diag(torch.tensor([1.0, 3.0]))[None]
        >>> iterate(gram, torch.eye(2)[None])[1]
        tensor([[1, 0]])
    """
    products, order = torch.bmm(grams, bases), None
    if ordered:
        order = torch.linalg.vecdot(bases, products, dim=1).argsort(dim=1, descending=True)
        products = products.take_along_dim(order[:, None], 2)
    wide = products.to(torch.promote_types(products.dtype, torch.float32))
    return torch.linalg.qr(wide).Q, order
