"""`plywise pipeline` in processes that are interrupted, lost and resumed: the weights of one process."""

import json
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from plywise.local import checkpoint
from plywise.pipeline.cuts import time_components
from plywise.training.build import resolve_training
from plywise.training.config import TrainConfig
from plywise.training.session import open_session
from processes import ForkedCommand
from sameness import same

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a busy machine

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3),
    )

def data():
    x = torch.randn(207, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return x, y, x[:50] + 0.1, y[:50]

class Burst(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (float("nan") if self.calls > 12 else 1)

def burst():
    return [nn.Sequential(nn.Linear(6, 8), nn.ReLU()), Burst(8, 3)]
"""
DEADLINE = 300.0
PLAN = [
    "--model",
    "mine:net",
    "--split",
    "0,2,3,4",
    "--data",
    "mine:data",
    "--batch-size",
    "16",
    "--out",
    "run",
]
PER_EPOCH = 13  # 207 samples: the last batch has 15


@pytest.fixture(autouse=True)
def _project(user_module, monkeypatch):
    user_module("mine", MODULE)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # what plywise would set, and leave behind


@pytest.fixture
def one_process(monkeypatch):
    """Make this process the only one of a pipeline."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def kill_at_end(processes):
    """Kill the processes at the end if they still live."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait(DEADLINE)


def start_ranks(world, *words, port=None):
    """Start the processes of a pipeline, with the environment that torchrun would set."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    return kill_at_end(
        [
            ForkedCommand(
                ["plywise", "pipeline", *words],
                {**place, "RANK": str(rank)},
                Path(f"out{rank}"),
                Path(f"err{rank}"),
            )
            for rank in range(world)
        ]
    )


def torchrun(world, *words, program=("-m", "plywise")):
    """Start a pipeline with torchrun."""
    command = ["torchrun", "--nproc-per-node", str(world), *program, "pipeline", *words]
    return kill_at_end([ForkedCommand(command, {"OMP_NUM_THREADS": "1"}, Path("out0"), Path("err0"))])


def wait_for_exit(processes):
    """Return the exit statuses of all processes, within the deadline."""
    end = time.monotonic() + DEADLINE
    return [process.wait(max(end - time.monotonic(), 0.1)) for process in processes]


def wait_for(processes, text):
    """Wait until the first process has printed this text."""
    end = time.monotonic() + DEADLINE
    while text not in Path("out0").read_text():
        alive = time.monotonic() < end and all(process.poll() is None for process in processes)
        assert alive, [path.read_text() for path in sorted(Path().glob("err*"))]
        time.sleep(0.02)


def read_messages(path):
    """Read the messages of plywise from a file."""
    return [line for line in Path(path).read_text().splitlines() if line.startswith(("plywise:", "Interr"))]


def load_state(out):
    """Load everything in the last checkpoint of a run."""
    folder = Path(out) / "checkpoints"
    names = ["learner", *(f"component {index}" for index in range(4))]
    return checkpoint.load(folder, None, names)


def read_logged_steps(name):
    return [json.loads(line)["step"] for line in Path("run", name).read_text().splitlines()]


# ---- in one process ------------------------------------------------------------------------------------


def test_without_torchrun_the_command_is_shown(plywise, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plywise", "pipeline", "--cuts", "0,2"])
    code, _, err = plywise("pipeline", "--cuts", "0,2")
    assert code == 1
    assert "torchrun --nproc-per-node 2 -m plywise pipeline --cuts 0,2" in err


def test_one_stage_is_train(plywise, one_process):
    """Each command can resume the other's run."""
    assert plywise("pipeline", *PLAN, "--epochs", "1")[0] == 0
    assert plywise("train", *PLAN, "--epochs", "2")[0] == 0
    code, out, _ = plywise("pipeline", *PLAN, "--epochs", "3")
    assert code == 0
    assert f"Goes on from the checkpoint of step {2 * PER_EPOCH} in run." in out
    assert "Components by stage: 0–3." in out
    code, out, _ = plywise("pipeline", *PLAN, "--epochs", "3")
    assert out.startswith(f"The run in run is finished: {3 * PER_EPOCH} steps, test accuracy ")
    assert plywise("train", *PLAN[:-1], "whole", "--epochs", "3")[0] == 0
    assert same(load_state("run"), load_state("whole"))
    stage = list(range(1, PER_EPOCH + 1)) + list(range(2 * PER_EPOCH + 1, 3 * PER_EPOCH + 1))
    assert read_logged_steps("log.stage0.jsonl") == stage
    assert read_logged_steps("log.jsonl") == list(range(PER_EPOCH + 1, 2 * PER_EPOCH + 1))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--replicas", "2"], "rank 0: 1 processes do not make stages of 2 replicas each."),
        (["--cuts", "0,2"], "makes 2 stages, and 1 processes were started for 1"),
        (["--cuts", "1"], "rising from 0 and below 4"),
        (["--cuts", "a"], "cuts must be whole numbers, as in 0,2, not 'a'."),
        (["--learner", "DirectFeedback"], "it runs in one process. `plywise train` takes it."),
        (["--rule", "Prox"], "No rule is called 'Prox'. Did you mean ProxProp"),
        (["nowhere.toml"], "There is no file nowhere.toml."),
    ],
)
def test_arguments_that_do_not_fit_are_reported(plywise, one_process, words, text):
    code, out, err = plywise("pipeline", *words, *PLAN)
    assert (code, out) == (1, "")
    assert text in err
    assert not Path("run", "plan.json").exists()


def test_lost_checkpoints_are_missed(plywise, one_process):
    assert plywise("pipeline", *PLAN, "--epochs", "1")[0] == 0
    Path("run", "checkpoints").rename("elsewhere")
    code, _, err = plywise("pipeline", *PLAN, "--epochs", "2")
    assert code == 1
    assert "no checkpoint in run/checkpoints: bring them back to go on." in err
    Path("elsewhere").rename("run/checkpoints")
    assert plywise("pipeline", *PLAN, "--epochs", "2")[0] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "KFAC", "optimizer": "SGD", "rate": 0.1},
        {"learner": "AssociatedLearning", "set": {"code": 4}},
        {"learner": "CascadedForward"},
        {"learner": "LocalForwardGradient"},
    ],
)
def test_measuring_leaves_the_learner_as_it_is(settings):
    plan = TrainConfig(model="mine:net", split=(0, 2, 4), data="mine:data", **settings)
    training = resolve_training(plan)
    x, y = training.data.train.x[:16], training.data.train.y[:16]

    def learner():
        return training.make_learner(training.make_blocks()[0])

    plain, measured = learner(), learner()
    for step in range(4):
        if step in (0, 2):
            costs = time_components(measured, x, y)
            assert len(costs) == 3
            assert min(costs) > 0
        assert torch.equal(plain.step(x, y), measured.step(x, y))
        assert same(plain.state_dict(), measured.state_dict())


# ---- in several ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with start_ranks(1, *PLAN, port=port) as processes:
            assert wait_for_exit(processes) == [1]
    (message,) = read_messages("err0")
    assert f"cannot meet the others at 127.0.0.1:{port}" in message
    assert "Is the port in use" in message


@pytest.mark.slow
def test_a_run_resumes_across_launchers_with_the_same_weights(tmp_path):
    """Two stages, interrupted at the second, then one process, then torchrun with measured cuts."""
    endless = ["--epochs", "100000", "--every", "7"]
    with start_ranks(2, *PLAN, *endless, "--cuts", "0,1") as processes:
        wait_for(processes, "\nepoch      2/")
        processes[1].send_signal(signal.SIGTERM)
        assert wait_for_exit(processes) == [130, 130]
    (message,) = read_messages("err0")
    step = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"The checkpoint of step {step} is in run" in message
    assert read_messages("err1") == []
    assert Path("out1").read_text() == ""
    for name in ("log.stage0.jsonl", "log.stage1.jsonl"):
        assert read_logged_steps(name) == list(range(1, step + 1))

    settings = {"model": "mine:net", "split": (0, 2, 3, 4), "data": "mine:data", "batch_size": 16}
    session = open_session(TrainConfig(**settings, epochs=100000, out=tmp_path / "run"))
    stop = step + PER_EPOCH + 3
    session.run(lambda line: session.engine.ask_to_stop() if line.step == stop else None)
    assert read_logged_steps("log.jsonl") == list(range(step + 1, stop + 1))

    epochs = stop // PER_EPOCH + 2
    with torchrun(2, *PLAN, "--epochs", str(epochs)) as processes:
        assert wait_for_exit(processes) == [0], Path("err0").read_text()
    assert f"Trained {epochs * PER_EPOCH} steps" in Path("out0").read_text()
    assert read_logged_steps("log.stage1.jsonl")[step:] == list(range(stop + 1, epochs * PER_EPOCH + 1))

    open_session(TrainConfig(**settings, epochs=epochs, out=tmp_path / "whole")).run()
    assert same(load_state("run"), load_state("whole"))


@pytest.mark.slow
def test_ctrl_c_at_torchrun(tmp_path):
    with torchrun(2, *PLAN, "--epochs", "100000") as processes:
        wait_for(processes, "\nepoch      2/")
        processes[0].send_signal(signal.SIGINT)
        wait_for_exit(processes)  # with torchrun's own status
    (message,) = read_messages("err0")
    step = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert message.startswith(
        f"Interrupted. The checkpoint of step {step} is in run: the same command goes on"
    )
    assert step > PER_EPOCH


@pytest.mark.slow
def test_replicas_stop_together(tmp_path):
    with start_ranks(2, *PLAN, "--epochs", "100000", "--replicas", "2") as processes:
        wait_for(processes, "\nepoch      2/")
        processes[1].send_signal(signal.SIGINT)
        assert wait_for_exit(processes) == [130, 130]
    step = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert read_logged_steps("log.stage0.jsonl") == list(range(1, step + 1))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all(tmp_path):
    words = [
        "--model",
        "mine:burst",
        "--data",
        "mine:data",
        "--batch-size",
        "16",
        "--every",
        "5",
        "--out",
        "run",
    ]
    with start_ranks(2, *words, "--cuts", "0,1") as processes:
        assert wait_for_exit(processes) == [1, 1]
    (first,), (second,) = read_messages("err0"), read_messages("err1")
    assert "stage 0 stops: stage 1 (rank 1) failed: " in first
    assert (
        "The loss of component 1 is nan at step 13. The checkpoint of step 10 in run/checkpoints stays."
        in second
    )
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [0, 5, 10]


def find_stages(launcher):
    """Find the processes that torchrun has started, by their entries in /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(words[1]) == launcher.pid and b"plywise" in (entry / "cmdline").read_bytes():
                found.append(entry)
    return found


def is_alive(entry):
    with suppress(OSError):
        return (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "program"),
    [("at once", ["-m", "plywise"]), ("at once", ["plywise_command.py"]), ("later", ["-m", "plywise"])],
)
def test_stages_end_with_a_torchrun_that_is_killed(moment, program):
    """They end at once, even before the stages are connected and watched; they used to live for minutes."""
    Path("plywise_command.py").write_text("from plywise.cli import main\n\nmain()\n")  # what pip installs
    with torchrun(2, *PLAN, "--epochs", "100000", program=program) as processes:
        end = time.monotonic() + DEADLINE
        while len(stages := find_stages(processes[0])) < 2:
            assert time.monotonic() < end, Path("err0").read_text()
            time.sleep(0.01)
        if moment == "at once":
            while any(len(list((entry / "task").iterdir())) < 2 for entry in stages):  # they follow torchrun
                assert time.monotonic() < end, Path("err0").read_text()
                time.sleep(0.01)
        else:
            wait_for(processes, "epoch")
        processes[0].kill()
        processes[0].wait(DEADLINE)
        end = time.monotonic() + 30
        while left := [entry for entry in stages if is_alive(entry)]:
            assert time.monotonic() < end, left
            time.sleep(0.05)
