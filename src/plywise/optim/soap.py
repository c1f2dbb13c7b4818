"""SOAP: Adam in the eigenbases of Shampoo, for all matrices of a shape at once."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise.engine.rule import require_whole
from plywise.optim.plain import Group
from plywise.optim.stacked import Shape, Stack, StackedOptimizer, compute_adam_step

Rows = slice
"""Parameters of a stack: all of them, or one."""


class SOAP(StackedOptimizer):
    """Adam in the eigenbases of the gradient's second moments on both sides of a weight.

    Idea: Adam treats each weight on its own, and so depends on the axes. In the eigenbases of G Gᵀ and Gᵀ G
        the entries of the gradient are nearly uncorrelated, and Adam does there what Shampoo does with roots.
        The bases turn slowly: one step of power iteration every now and then follows them.
    Equation: L ← β L + (1 − β) G Gᵀ, R ← β R + (1 − β) Gᵀ G; X = Q_Lᵀ G Q_R, D = Adam's step for X;
        W ← (1 − lr weight_decay)(W − lr Q_L D Q_Rᵀ); every ``precondition_frequency`` steps Q = qr(L Q), its
        columns sorted by diag(Qᵀ L Q), the same for R, and momentum turned into the new bases.
    Use when: a step's forward and backward cost more than some products of the weights' sides.
    Do not use when: layers are wide and batches small: then it costs several plain steps.
    Layers: parameters of two and more dimensions, a basis for each dimension of at most
        ``max_precondition_dim``; the others move by Adam.
    Cost: six products of a weight with its sides a step, two in half of them with ``one_sided``; four more
        matrices of the sides' sizes; a QR of each side every ``precondition_frequency`` steps. A call of each
        function for all weights of a shape. No host synchronisation after the first step, which has an eigh.
    Status: faithful to the authors' code, number by number in float64: the first step only begins the
        statistics, ε is added before Adam's correction, decay comes after the step. Momentum is kept in the
        bases and turned when they are, which is the same. With ``stagger`` a variant, see there.
    Source: Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024 (arXiv 2409.11321).
    Code: nikhilvyas/SOAP.
    Results: the paper's language models are not reproduced here. On small networks a step costs what that
        of the package pytorch_optimizer costs, within noise: benchmarks/peers_cost.py.
    Limits: a refresh of all sides falls into one step unless ``stagger`` is on; the first step has an eigh of
        every side. State has the dtype of the weights. DTensors are not handled.

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
        stagger: give sides their turns in different steps of a cycle, the largest first, so that no step
            refreshes all. Numbers then differ from the paper's: each basis is renewed as often, but at other
            steps. Default False.
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
        """Adam's moments, in the bases; statistics and basis of every side that has one."""
        own = tuple(param.shape)
        sides = choose_sides(group, own) if param.numel() else []
        if not sides:
            return None
        squares = {f"{name}_{side}": (own[side],) * 2 for name in ("gram", "basis") for side in sides}
        return {"exp_avg": own, "exp_avg_sq": own, **squares}

    def arrange(self, group: Group, stacks: list[Stack]) -> None:
        """Give each side its step in a cycle, by the sizes of all the group's sides."""
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
        """A step in the bases; the first one only begins them."""
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
        """The step at rate 1 for the gradient in the bases, or for one that has none."""
        correction = math.sqrt(1 - group["betas"][1] ** step)
        return compute_adam_step(stack.state, inside, group["betas"], group["eps"] / correction, step)

    def begin(self, group: Group, stack: Stack, gradient: Tensor) -> None:
        """The first statistics, and their eigenvectors."""
        self.learn(group, stack, gradient, gradient)
        for side in stack.turns:
            stack.state[f"basis_{side}"].copy_(find_eigenvectors(stack.state[f"gram_{side}"]))

    def learn(self, group: Group, stack: Stack, gradient: Tensor, inside: Tensor) -> None:
        """Bring the statistics of all sides up to date; ``inside`` is the gradient in the bases."""
        decay = get_decay(group)
        for side in stack.turns:
            rows = gradient.movedim(side + 1, 1).flatten(2)
            stack.state[f"gram_{side}"].baddbmm_(rows, rows.mT, beta=decay, alpha=1 - decay)

    def finish(self, group: Group, stacks: list[Stack]) -> None:
        """New bases for the sides whose turn it is, all of one size at once."""
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
    """β of the statistics."""
    decay = group["shampoo_beta"]
    return group["betas"][1] if decay is None else decay


def choose_sides(group: Group, shape: Shape) -> list[int]:
    """The dimensions of a parameter that get a basis; those of size 1 need none.

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
    """``stacked``, (k, *shape), from the parameters' axes into the bases, or ``back``; the same shape.

    Each round takes the first dimension to the end, so that all are in their places after the last.
    """
    x = stacked
    for side, size in enumerate(stack.shape):
        x = x.reshape(len(stacked), size, -1).mT
        if side in stack.turns:
            basis = stack.state[f"basis_{side}"]
            x = torch.bmm(x, basis.mT if back else basis)
    return x.reshape(stacked.shape)


def find_eigenvectors(grams: Tensor) -> Tensor:
    """Eigenvectors of (k, n, n) symmetric matrices, in columns, the largest eigenvalue first."""
    wide = grams.to(torch.promote_types(grams.dtype, torch.float32))
    try:
        vectors = torch.linalg.eigh(wide).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of float32 with many equal eigenvalues
        vectors = torch.linalg.eigh(wide.double()).eigenvectors
    return vectors.flip(2)


def find_due(step: int, frequency: int, turns: Sequence[int]) -> list[Rows]:
    """The parameters whose turn it is: all of them as one slice, or a slice for each.

    Example:
        >>> find_due(10, 10, [0, 0]), find_due(9, 10, [0, 1]), find_due(0, 10, [0, 0])
        ([slice(None, None, None)], [slice(1, 2, None)], [])
    """
    if step == 0:
        return []
    due = [row for row, turn in enumerate(turns) if (step + turn) % frequency == 0]
    return [slice(None)] if len(due) == len(turns) else [slice(row, row + 1) for row in due]


def renew(sides: Sequence[tuple[Stack, int, Rows]], ordered: bool) -> None:
    """A step of power iteration for the bases of sides of one size, and their moments turned into them."""
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
    """``qr(gram @ basis)``, its columns sorted by eigenvalue if ``ordered``, and their order before, (k, n).

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
