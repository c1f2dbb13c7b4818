"""Makes and leaves process groups of torch.distributed, and ends every wait on them."""

import os
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from plywise._util.process_groups import end_with_torchrun
from plywise.errors import PipelineError
from plywise.pipeline.watch import decline, prepare

FOREVER = timedelta(days=30)
"""Timeout of torch's own waits; ours end by the watch, which distinguishes slow stages from lost ones."""

_LOOPBACK = "127.0.0.1"
_MEETING = timedelta(seconds=60)
_PARTING = 7061727  # a tag that no message has
_joined = count()


class Groups:
    """The connections of one process: to all others, to its neighbours, to its replicas.

    Attributes:
        everyone: all processes.
        links: the groups shared with the process before and the one after, by its rank.
        back: the same for what goes from a stage to the one before, where a learner sends gradients back.
        replicas: the processes of this stage; None if there is just this one.
    """

    def __init__(self) -> None:
        self._made: list[dist.ProcessGroup] = []
        self._ending = threading.Lock()
        self.links: dict[int, dist.ProcessGroup] = {}
        self.back: dict[int, dist.ProcessGroup] = {}
        self.replicas: dist.ProcessGroup | None = None

    def make(self, stages: int, replicas: int, both_ways: bool) -> None:
        """Connect; every process makes every group, in the same order."""
        rank, world = dist.get_rank(), stages * replicas
        self.everyone = self._keep(dist.new_group(timeout=FOREVER, backend="gloo"))
        for links in (self.links, self.back) if both_ways else (self.links,):
            for here in range(world - replicas):
                ends = [here, here + replicas]
                group = dist.new_group(ends, timeout=FOREVER, backend="gloo")
                if rank in ends:
                    links[ends[1 - ends.index(rank)]] = self._keep(group)
        if replicas > 1:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = FOREVER
            mesh = init_device_mesh(
                "cpu",
                (stages, replicas),
                mesh_dim_names=("stage", "replica"),
                backend_override={"replica": options},
            )
            self.replicas = self._keep(mesh.get_group("replica"))

    def _keep(self, group: dist.ProcessGroup) -> dist.ProcessGroup:
        self._made.append(group)
        return group

    def abort(self) -> None:
        """End every wait on these connections with an error, here and at their other ends.

        Gloo closes all connections of a group as soon as one wait in it has run out of time.
        """
        with self._ending:
            for group in self._made:
                other = (group.rank() + 1) % group.size()
                if other == group.rank():
                    continue
                with suppress(RuntimeError):
                    group.recv([torch.empty(1)], other, _PARTING).wait(timedelta(milliseconds=1))

    def destroy(self) -> None:
        """Leave the groups."""
        with self._ending:
            for group in self._made:
                dist.destroy_process_group(group)
            self._made.clear()


def join() -> None:
    """Meet the other processes that torchrun started.

    Raises:
        PipelineError: torchrun did not start this one, or the others cannot be reached.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        raise PipelineError(
            "This process was not started by torchrun. Start it so: torchrun --nproc-per-node 2 -m plywise "
            "pipeline ..., or call torch.distributed.init_process_group yourself.",
            see="pipeline-start",
        )
    end_with_torchrun()
    if _on_one_host():
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    try:
        # what an attempt that failed, or an earlier pipeline, has left in the store stays out of the way
        place = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_joined)}"
        store = PrefixStore(place, _meeting_place())
        dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world), timeout=_MEETING)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PipelineError(
            f"Process {rank} of {world} cannot meet the others at {where}: {str(error).splitlines()[0]}. Is "
            "the port in use, or a process missing? With several hosts, does GLOO_SOCKET_IFNAME name the "
            "network card between them?",
            see="pipeline-start",
        ) from error


@cache
def _meeting_place() -> TCPStore:
    """Return the store where torchrun lets its processes meet; without torchrun, in the process of rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _serve(host, port)
    return TCPStore(host, port, is_master=False, timeout=_MEETING)


def _on_one_host() -> bool:
    """Return whether all processes are on this host: then nothing listens to the outside."""
    world = os.environ.get("WORLD_SIZE")
    if os.environ.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1"):
        return True
    return world is not None and os.environ.get("LOCAL_WORLD_SIZE") == world


def own_store(plan: str, timeout_s: float) -> TCPStore:
    """Make a store for one pipeline, in the process of rank 0; a restart gets an empty one.

    Args:
        plan: what all processes must agree on, in words.
        timeout_s: seconds to reach it.

    Raises:
        PipelineError: it cannot be reached, or another process has another plan.
    """
    host = _LOOPBACK if _on_one_host() else os.environ["MASTER_ADDR"]
    rank, port = dist.get_rank(), torch.zeros(1, dtype=torch.int64)
    own = None
    if rank == 0:
        own = _serve(host, 0)
        prepare(own, dist.get_world_size())
        own.set("plan", plan)
        port[0] = own.port
    try:
        dist.broadcast(port, 0)
        if own is not None:
            return own
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
        first = store.get("plan").decode()
    except RuntimeError as error:
        raise PipelineError(
            f"The processes cannot meet at {host}:{int(port)}: {str(error).splitlines()[0]}. Do all of them "
            "make the pipeline, and is MASTER_ADDR set, if they are on several hosts?",
            see="pipeline-start",
        ) from error
    if first != plan:
        trouble = f"all processes must make the same pipeline, but rank {rank} has {plan}, and rank 0 {first}"
        decline(store, rank, trouble)
        raise PipelineError(f"{trouble[0].upper()}{trouble[1:]}.", see="pipeline-start")
    return store


def _serve(host: str, port: int) -> TCPStore:
    """Return a store in this process; it listens on the loopback device alone, if all are on one host.

    Args:
        host: where the others find it.
        port: the same; 0 for any.
    """
    if not _on_one_host():
        return TCPStore(host, port, is_master=True, wait_for_workers=False)
    with socket.create_server((_LOOPBACK, port)) as server:
        port, listening = server.getsockname()[1], server.detach()
    return TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening)
