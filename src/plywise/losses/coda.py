"""CoDA: AUC maximisation on many workers that talk only now and then."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plywise._util.checks import require_positive, require_whole
from plywise._util.modes import evaluating
from plywise._util.renamed import serve_old_arguments
from plywise.errors import NonFiniteError, PlywiseError
from plywise.losses.auc_margin import AUCMargin, checked_batch
from plywise.optim.anchor import ProximalAnchor

GROWTH = 3
"""From stage to stage: so many times the steps, the learning rate's share, the batches that settle α."""


class CoDA:
    """Communication-efficient distributed AUC maximisation: a min-max loss by local steps, in stages.

    Idea: K workers take steps of their own on a min-max form of the AUC and average only every so many steps.
        A pull towards the last stage's average iterate makes the problem of each stage strongly convex where
        the loss is weakly so; stages grow longer and steps shorter.
    Equation: in stage s, T_s = first_stage · 3^(s−1) steps with η_s = lr / 3^(s−1), on each worker
        v ← v − η_s (∂F/∂v + (v − v₀)/gamma) for v = (weights, a, b), and α ← α + η_s ∂F/∂α; all four are
        averaged over the workers every ``every`` steps (times ``every_growth^(s−1)``). After it v and v₀ are
        the average over steps and workers, and 3^s batches a worker settle α at margin + E₋h − E₊h.
    Use when: the AUC is what counts, data are spread over workers, and averaging at each step is too slow.
    Do not use when: there is one worker: `AUCMargin` with any optimizer is simpler.
    Layers: any network with one score a sample; parameters that do not train stay as they are.
    Cost: a plain step, two copies of the weights, and a sum of all weights over the workers every ``every``
        steps instead of each.
    Status: variant. In the authors' code b is pulled by a − a₀, α is not moved inside a stage, averages of a
        and b are never formed and that of the weights is T+1 terms over T; here they are as in the paper.
        Workers begin with the first one's weights, where theirs average all; running statistics (batch norm)
        are averaged too. α is that of the paper plus the margin, which leaves the steps as they are.
    Source: Guo, Liu, Yuan, Shen, Liu, Yang, "Communication-Efficient Distributed Stochastic AUC Maximization
        with Deep Neural Networks", ICML 2020, arXiv 2005.02426.
    Code: ZhishuaiGuo/DistributedAUC
    Results: not reproduced here: the paper's are speed-ups on ImageNet and CIFAR with up to 16 GPUs.
        tests/losses/test_coda.py trains on digits in two processes.
    Limits: K workers take the steps of one that is given their batches joined, up to rounding, if
        ``every=1``, batches have one size and the loss a ``positive_share`` (or batches as many positives
        each), and samples do not meet in the network as in batch norm. With a larger ``every`` they do not.
        Between two averagings each worker has weights and a state of its own. All workers have to call `step`
        equally often. If one raises, the others do when they have waited for it.

    Args:
        model: the network; it is changed in place.
        loss: its a, b and α are trained here. For the paper's objective ``floor=-math.inf``; with its
            default, α stays at or above 0.
        lr: learning rate of the first stage, η₀. Their script's is 0.1 for an F that is p(1−p) times this
            one, with p = 0.71. Default 0.02. Range 1e-4 to 0.1.
        gamma: how weak the pull is: 1/gamma is its strength. Their script's is 2000, on that scale. Default
            400. Range 1 to 1e4.
        first_stage: steps of the first stage, T₀. Default 5000. Range 10 to 1e5.
        every: steps from one averaging to the next, I. Default 64. Range 1 to 1024.
        every_growth: by what ``every`` grows from stage to stage. √3 keeps it in proportion to 1/√η_s, as the
            paper's analysis does (recalled: its text could not be read); 3 keeps the number of averagings in
            a stage. Default 1. Range 1 to 3.
        group: the workers; None for all processes, or one process if torch.distributed is not in use.
        timeout_s: seconds to wait for the other workers at an averaging. Default 300. Range 10 to 3600.

    Attributes:
        stage: the stage's number, from 1.
        taken: steps taken in this stage.

    Raises:
        ValueError: a number is out of range.
        PlywiseError: the other workers do not come, or have other settings; this is where all meet first.

    Example:
        >>> import math, torch
        >>> from plywise.losses import AUCMargin, CoDA
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 3)
        >>> y = x[:, 0] > 1.3
        >>> model = torch.nn.Linear(3, 1)
        >>> coda = CoDA(model, AUCMargin(floor=-math.inf), lr=0.1, first_stage=20)
        >>> for _ in range(3 + 20 + 9 + 60):  # batches that settle α, steps, and the same of the second stage
        ...     loss = coda.step(x, y)
        >>> coda.stage
        3
        >>> bool(model(x[y]).min() > model(x[~y]).mean())
        True
    """

    @serve_old_arguments(patience="timeout_s")
    def __init__(
        self,
        model: nn.Module,
        loss: AUCMargin,
        *,
        lr: float = 0.02,
        gamma: float = 400.0,
        first_stage: int = 5000,
        every: int = 64,
        every_growth: float = 1.0,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        require_positive(self, lr=lr, gamma=gamma, timeout_s=timeout_s, every_growth=every_growth)
        require_whole(self, first_stage=first_stage, every=every)
        if every_growth < 1:
            raise ValueError(f"CoDA: every_growth must be 1 or more, not {every_growth!r}.")
        self.model, self.loss = model, loss
        self.lr, self.gamma, self.first_stage, self.every = lr, gamma, first_stage, every
        self.every_growth = every_growth
        self.stage, self.taken = 1, 0
        self._workers = _Workers(group, timeout_s, loss.a.device)
        primal = [*(p for p in model.parameters() if p.requires_grad), loss.a, loss.b]
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._shared = [*primal, loss.alpha, *self._statistics]
        self._begin_alike()
        self._anchor = ProximalAnchor(primal)
        self._optimizer = torch.optim.SGD([*primal, loss.alpha], lr=lr)
        self._looks = 0  # batches that have been looked at to settle α in this stage
        self._sums = loss.a.new_zeros(4)  # of them: scores of positives and negatives, how many of each

    @property
    def settling(self) -> bool:
        """Whether the next batch is one of the 3^s that settle α, and moves nothing else."""
        return self._looks < GROWTH**self.stage

    @property
    def period(self) -> int:
        """Steps from one averaging to the next in this stage."""
        return round(self.every * self.every_growth ** (self.stage - 1))

    def step(self, x: Any, y: Tensor) -> Tensor:
        """One batch of this worker's: a step, or as a stage begins one of the 3^s batches that settle α.

        Args:
            x: what the model takes.
            y: labels, 0 and 1 or booleans.

        Returns:
            The loss of this worker's batch (0-d, detached).

        Raises:
            ValueError: scores and labels do not fit: see `AUCMargin.forward`.
            NonFiniteError: the loss is not finite; this step has moved nothing.
            PlywiseError: the other workers do not come, or the batches that are to settle α lack a class.
        """
        if self.settling:
            return self._look(x, y)
        loss = self._descend(x, y)
        self.taken += 1
        self._anchor.accumulate()
        if self.taken % self.period == 0:
            self._average(self._shared)
        if self.taken == self.first_stage * GROWTH ** (self.stage - 1):
            self._next_stage()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Where this worker is: stage, steps, anchor. Model and loss have state dicts of their own."""
        return {
            "stage": self.stage,
            "taken": self.taken,
            "looks": self._looks,
            "sums": self._sums.clone(),
            "anchor": self._anchor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of this worker's; load its model and loss as well.

        Raises:
            StateError: the state is of another network.
        """
        self._anchor.load_state_dict(state["anchor"])
        self.stage, self.taken, self._looks = state["stage"], state["taken"], state["looks"]
        self._sums.copy_(state["sums"])

    @torch.no_grad()
    def _look(self, x: Any, y: Tensor) -> Tensor:
        with evaluating(self.model):
            given = self.model(x)
        loss = self._finite(self.loss(given, y))
        scores, positive, counts = checked_batch(given, y, self.loss.a.dtype)
        self._sums += torch.stack(
            [scores[positive].sum(), scores[~positive].sum(), *map(scores.new_tensor, counts)]
        )
        self._looks += 1
        if not self.settling:
            self._settle()
        return loss

    @torch.no_grad()
    def _settle(self) -> None:
        when = f"settling α in stage {self.stage}"
        of_positives, of_negatives, positives, negatives = self._workers.sum(self._sums.clone(), when)
        self._sums.zero_()
        if not (positives and negatives):
            raise PlywiseError(
                f"CoDA: {int(positives)} of {int(positives + negatives)} samples that are to settle α in "
                f"stage {self.stage} are positive, so a class has no mean score. Give larger batches."
            )
        gap = of_negatives / negatives - of_positives / positives
        self.loss.alpha.copy_((self.loss.margin + gap).clamp(min=self.loss.floor))

    def _descend(self, x: Any, y: Tensor) -> Tensor:
        for settings in self._optimizer.param_groups:
            settings["lr"] = self.lr / GROWTH ** (self.stage - 1)
        self._optimizer.zero_grad()
        loss = self._finite(self.loss(self.model(x), y))
        loss.backward()
        self._anchor.add_gradient(1 / self.gamma)
        self._optimizer.step()
        return loss.detach()

    def _finite(self, loss: Tensor) -> Tensor:
        if not loss.isfinite():
            raise NonFiniteError(
                f"CoDA: the loss is {loss.item()} in stage {self.stage}, after {self.taken} steps. Look at "
                "this batch, or lower lr."
            )
        return loss

    @torch.no_grad()
    def _next_stage(self) -> None:
        self._anchor.refresh_to_average()
        self._average([*self._anchor.anchors, *self._statistics])
        for param, anchor in zip(self._anchor.params, self._anchor.anchors, strict=True):
            param.copy_(anchor)
        self.stage, self.taken, self._looks = self.stage + 1, 0, 0

    @torch.no_grad()
    def _average(self, tensors: list[Tensor]) -> None:
        """Make each the mean over the workers."""
        if self._workers.size > 1:
            when = f"averaging after {self.taken} steps of stage {self.stage}"
            _scatter(self._workers.sum(_gather(tensors), when) / self._workers.size, tensors)

    @torch.no_grad()
    def _begin_alike(self) -> None:
        """Give all workers what the first one has, if they have the same plan; if not, all of them raise."""
        if self._workers.size == 1:
            return
        settings = ("lr", "gamma", "first_stage", "every", "every_growth")
        plan = {name: getattr(self, name) for name in settings}
        plan["numbers to share"] = sum(tensor.numel() for tensor in self._shared)
        for name, (least, most) in zip(plan, self._workers.ranges(list(plan.values())), strict=True):
            if least != most:
                raise PlywiseError(
                    f"CoDA: the workers have from {least:g} to {most:g} as {name} (worker "
                    f"{self._workers.rank}: {plan[name]:g}). All need the same settings and the same network."
                )
        _scatter(self._workers.of_first(_gather(self._shared)), self._shared)


class _Workers:
    """The processes that train together. Every wait for them ends."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float, device: torch.device) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if there else (0, 1)
        self._group, self._timeout_s, self._device = group, timeout_s, device

    def sum(self, flat: Tensor, when: str) -> Tensor:
        """The sum over all of them, in place."""
        if self.size > 1:
            self._meet(partial(dist.all_reduce, flat, group=self._group), when)
        return flat

    def of_first(self, flat: Tensor) -> Tensor:
        """What the first has, in place."""
        self._meet(partial(dist.broadcast, flat, group=self._group, group_src=0), "meeting them")
        return flat

    def ranges(self, numbers: list[float]) -> list[tuple[float, float]]:
        """The least and the greatest that any of them has of each number."""
        both = torch.tensor(
            [[-number, number] for number in numbers], dtype=torch.float64, device=self._device
        )
        greatest = dist.ReduceOp.MAX
        self._meet(partial(dist.all_reduce, both, greatest, group=self._group), "meeting them")
        return [(-least, most) for least, most in both.tolist()]

    def _meet(self, begin: Callable[..., Any], when: str) -> None:
        try:
            begin(async_op=True).wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise PlywiseError(
                f"CoDA: worker {self.rank} of {self.size} does not reach the others, {when}. Is a worker "
                f"lost, does one have fewer batches, or is timeout_s={self._timeout_s:g} s too short?"
            ) from error


def _gather(tensors: list[Tensor]) -> Tensor:
    """All of them in one vector, of at least float32."""
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])


def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
