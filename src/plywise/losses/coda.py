"""CoDA: AUC maximisation on many workers that communicate rarely."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plywise._util.checks import require_kind, require_positive, require_whole
from plywise._util.modes import evaluating
from plywise._util.renamed import serve_old_arguments
from plywise.errors import NonFiniteError, PlywiseError
from plywise.losses.auc_margin import AUCMargin, check_batch
from plywise.optim.anchor import ProximalAnchor

GROWTH = 3
"""From stage to stage steps and batches that settle α are multiplied by it; the learning rate is divided by
it."""


class CoDA:
    """Communication-efficient distributed AUC maximisation: local steps on a min-max loss, in stages.

    Idea: K workers take local steps on a min-max form of the AUC, and average only now and then. A proximal
        term that pulls towards the average iterate of the last stage makes the problem of each stage strongly
        convex if the loss is weakly convex. Each stage has more and smaller steps than the one before.
    Equation: in stage s, T_s = first_stage · 3^(s−1) steps with η_s = lr / 3^(s−1), on each worker
        v ← v − η_s (∂F/∂v + (v − v₀)/gamma) for v = (weights, a, b), and α ← α + η_s ∂F/∂α; all four are
        averaged over the workers every ``every`` steps (times ``every_growth^(s−1)``). After it v and v₀ are
        the average over steps and workers, and 3^s batches a worker settle α at margin + E₋h − E₊h.
    Use when: the AUC is what counts, data are spread over workers, and averaging at each step is too slow.
    Do not use when: there is only one worker: `AUCMargin` with any optimizer is simpler.
    Layers: any network with one score a sample; parameters that do not train stay as they are.
    Cost: a plain step, two copies of the weights, and a sum of all weights over the workers every ``every``
        steps instead of each.
    Status: variant. In the authors' code b is pulled by a − a₀, α does not change within a stage, a and b are
        not averaged, and the average of the weights divides T+1 terms by T. Here all of this is as in the
        paper. Workers begin with the weights of the first one; in the authors' code they begin with the
        average. Running statistics (batch norm) are averaged too. Our α is the paper's plus the margin, which
        does not change the steps.
    Source: Guo, Liu, Yuan, Shen, Liu, Yang, "Communication-Efficient Distributed Stochastic AUC Maximization
        with Deep Neural Networks", ICML 2020, arXiv 2005.02426.
    Code: ZhishuaiGuo/DistributedAUC
    Results: the paper reports speed-ups on ImageNet and CIFAR with up to 16 GPUs; not reproduced here.
        tests/losses/test_coda.py trains on digits in two processes.
    Limits: up to rounding, K workers take the same steps as one worker with their joined batches, if
        ``every=1``, all batches have the same size, the loss has a ``positive_share`` (or all batches have
        the same number of positives), and the network treats samples independently (no batch norm). With a
        larger ``every`` the steps differ. Between two averagings each worker has weights and a state of its
        own. All workers must call `step` equally often. If one raises, the others raise after ``timeout_s``.

    Args:
        model: the network; it is changed in place.
        loss: the loss, whose a, b and α are trained here. The paper's objective needs ``floor=-math.inf``;
            with the default floor, α stays at or above 0.
        lr: learning rate of the first stage, η₀. The authors' script has 0.1, for an F that is p(1−p) times
            this one, with p = 0.71. Default 0.02. Range 1e-4 to 0.1.
        gamma: the inverse of the strength of the proximal term. The authors' script has 2000, on that scale.
            Default 400. Range 1 to 1e4.
        first_stage: steps of the first stage, T₀. Default 5000. Range 10 to 1e5.
        every: steps from one averaging to the next, I. Default 64. Range 1 to 1024.
        every_growth: the factor by which ``every`` grows from stage to stage. √3 keeps it proportional to
            1/√η_s, as in the paper's analysis (quoted from memory, since we could not read its text); 3 keeps
            the number of averagings in a stage constant. Default 1. Range 1 to 3.
        group: the workers. None: all processes, or this one if torch.distributed is not in use.
        timeout_s: seconds to wait for the other workers at an averaging. Default 300. Range 10 to 3600.

    Attributes:
        stage: the number of the stage, counted from 1.
        taken: steps taken in this stage.

    Raises:
        ValueError: a number is out of range.
        PlywiseError: the other workers do not respond, or have other settings. The constructor is the first
            place where all workers communicate.

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
        require_kind(self, "model", model, nn.Module, "a torch.nn.Module")
        require_kind(self, "loss", loss, AUCMargin, "a plywise.losses.AUCMargin")
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
        self._looks = 0  # batches used to settle α in this stage
        self._sums = loss.a.new_zeros(4)  # sums of their positive and negative scores, and counts

    @property
    def settling(self) -> bool:
        """Whether the next batch is one of the 3^s that only settle α."""
        return self._looks < GROWTH**self.stage

    @property
    def period(self) -> int:
        """The number of steps from one averaging to the next in this stage."""
        return round(self.every * self.every_growth ** (self.stage - 1))

    def step(self, x: Any, y: Tensor) -> Tensor:
        """Take a step on a batch of this worker; at the start of a stage, use the batch to settle α instead.

        Args:
            x: the input of the model.
            y: labels, 0 and 1 or booleans.

        Returns:
            The loss of this worker's batch (0-d, detached).

        Raises:
            ValueError: scores and labels do not fit: see `AUCMargin.forward`.
            NonFiniteError: the loss is not finite; nothing was changed.
            PlywiseError: the other workers do not respond, or the batches that settle α lack a class.
        """
        if self.settling:
            return self._look(x, y)
        loss = self._descend(x, y)
        self.taken += 1
        self._anchor.accumulate()
        if self.taken % self.period == 0:
            self._average(self._shared)
        if self.taken == self.first_stage * GROWTH ** (self.stage - 1):
            self._begin_stage()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return stage, steps and anchor of this worker. Model and loss have state dicts of their own."""
        return {
            "stage": self.stage,
            "taken": self.taken,
            "looks": self._looks,
            "sums": self._sums.clone(),
            "anchor": self._anchor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of this worker. Load the model and the loss as well.

        Raises:
            StateError: the state belongs to another network.
        """
        self._anchor.load_state_dict(state["anchor"])
        self.stage, self.taken, self._looks = state["stage"], state["taken"], state["looks"]
        self._sums.copy_(state["sums"])

    @torch.no_grad()
    def _look(self, x: Any, y: Tensor) -> Tensor:
        with evaluating(self.model):
            given = self.model(x)
        loss = self._check_finite(self.loss(given, y))
        scores, positive, counts = check_batch(given, y, self.loss.a.dtype)
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
                f"CoDA: {int(positives)} of {int(positives + negatives)} samples that settle α in "
                f"stage {self.stage} are positive, so a class has no mean score. Give larger batches."
            )
        gap = of_negatives / negatives - of_positives / positives
        self.loss.alpha.copy_((self.loss.margin + gap).clamp(min=self.loss.floor))

    def _descend(self, x: Any, y: Tensor) -> Tensor:
        for settings in self._optimizer.param_groups:
            settings["lr"] = self.lr / GROWTH ** (self.stage - 1)
        self._optimizer.zero_grad()
        loss = self._check_finite(self.loss(self.model(x), y))
        loss.backward()
        self._anchor.add_gradient(1 / self.gamma)
        self._optimizer.step()
        return loss.detach()

    def _check_finite(self, loss: Tensor) -> Tensor:
        if not loss.isfinite():
            raise NonFiniteError(
                f"CoDA: the loss is {loss.item()} in stage {self.stage}, after {self.taken} steps. Look at "
                "this batch, or lower lr."
            )
        return loss

    @torch.no_grad()
    def _begin_stage(self) -> None:
        self._anchor.refresh_to_average()
        self._average([*self._anchor.anchors, *self._statistics])
        for param, anchor in zip(self._anchor.params, self._anchor.anchors, strict=True):
            param.copy_(anchor)
        self.stage, self.taken, self._looks = self.stage + 1, 0, 0

    @torch.no_grad()
    def _average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the workers."""
        if self._workers.size > 1:
            when = f"averaging after {self.taken} steps of stage {self.stage}"
            _scatter(self._workers.sum(_gather(tensors), when) / self._workers.size, tensors)

    @torch.no_grad()
    def _begin_alike(self) -> None:
        """Copy the state of the first worker to all. If settings differ, all of them raise."""
        if self._workers.size == 1:
            return
        settings = ("lr", "gamma", "first_stage", "every", "every_growth")
        plan = {name: getattr(self, name) for name in settings}
        plan["numbers to share"] = sum(tensor.numel() for tensor in self._shared)
        for name, (least, most) in zip(plan, self._workers.find_ranges(list(plan.values())), strict=True):
            if least != most:
                raise PlywiseError(
                    f"CoDA: the workers have from {least:g} to {most:g} as {name} (worker "
                    f"{self._workers.rank}: {plan[name]:g}). All need the same settings and the same network."
                )
        _scatter(self._workers.broadcast_first(_gather(self._shared)), self._shared)


class _Workers:
    """The processes that train together. Each wait for them has a time limit."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float, device: torch.device) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if there else (0, 1)
        self._group, self._timeout_s, self._device = group, timeout_s, device

    def sum(self, flat: Tensor, when: str) -> Tensor:
        """Sum over all workers, in place."""
        if self.size > 1:
            self._meet(partial(dist.all_reduce, flat, group=self._group), when)
        return flat

    def broadcast_first(self, flat: Tensor) -> Tensor:
        """Copy from the first worker, in place."""
        self._meet(partial(dist.broadcast, flat, group=self._group, group_src=0), "meeting them")
        return flat

    def find_ranges(self, numbers: list[float]) -> list[tuple[float, float]]:
        """Find the minimum and the maximum of each number over the workers."""
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
    """Join tensors in one vector, in float32 or a wider type."""
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])


def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
