"""Which processes train replicas of a rule's model, and so share its running state."""

import warnings
from collections.abc import Sequence

import torch.distributed as dist

from plywise.engine.processes.followed_parameters import SPREAD
from plywise.engine.processes.pipelining import runs_in_pipeline
from plywise.engine.processes.replicas import Replicas, find_training_group, refuse_join
from plywise.engine.sites import ParameterEntry


class TrainingProcesses:
    """The processes of one attachment, found in the first forward that DistributedDataParallel runs.

    Args:
        rule_name: the name of the rule's class.
        entries: the model's parameters.
        process_group: the processes that average gradients, if the user names them.

    Attributes:
        replicas: the processes that share the running state.
        is_pipelined: whether the model is a stage of a pipeline.
    """

    def __init__(
        self, rule_name: str, entries: Sequence[ParameterEntry], process_group: dist.ProcessGroup | None
    ) -> None:
        self._rule_name = rule_name
        self._entries = entries
        self._are_found = process_group is not None
        self.replicas = Replicas(process_group)
        self.is_pipelined = False

    @property
    def size(self) -> int:
        """How many processes share the state."""
        return self.replicas.size

    @property
    def are_known(self) -> bool:
        """Whether no later forward can show others."""
        return self._are_found or count_processes() == 1

    def find(self) -> None:
        """Find the processes that share the state: those of a running DDP or of fully_shard."""
        if count_processes() == 1:
            return
        refuse_join(self._rule_name)
        self.is_pipelined = runs_in_pipeline()
        if self._are_found:
            return
        group = find_training_group(self._entries)
        if group is not None:
            self.replicas = Replicas(group)
            self._are_found = True

    def warn_if_alone(self) -> None:
        """Warn once if other processes run that share nothing with this one."""
        # stages of a pipeline have other layers, and tensor parallelism gives all processes the same rows
        apart = self.is_pipelined or any(entry.excluded == SPREAD for entry in self._entries)
        if not self._are_found and not apart and count_processes() > 1:
            warnings.warn(
                f"{count_processes()} processes run, but no DistributedDataParallel was seen in this model's "
                f"forward: {self._rule_name} keeps statistics of this process alone. If gradients "
                "are averaged by other means, say over which processes: attach(..., process_group=...).",
                RuntimeWarning,
                stacklevel=2,
            )
            self._are_found = True


def count_processes() -> int:
    """Count the processes of torch.distributed; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
