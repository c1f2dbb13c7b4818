"""The tutorial's commands for two hosts, on two hosts: network namespaces with a cable between them."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from docs.pages import DOCS, blocks, commands
from plywise.cli import main
from processes import CONTEXT

from .starting import enter

PAGE = DOCS / "tutorials" / "pipeline.md"
PATIENCE = 120.0

pytestmark = pytest.mark.slow


def torchrun(folder: str, words: list[str]) -> None:
    """The launcher, in a folder that both hosts see."""
    os.chdir(folder)
    from torch.distributed import run

    run.main(words)


def test_the_commands_for_two_hosts_train_the_weights_of_one_process(
    tmp_path: Path, two_hosts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the page says to put in place of HOST and eth0, and nothing else."""
    page = blocks(PAGE)
    (plan,) = (block.code for block in page if block.code.startswith("# plan.toml\n"))
    (tmp_path / "plan.toml").write_text(plan, encoding="utf-8")
    told = [
        command
        for block in page
        if block.kind == "console"
        for command in commands(block.code.replace("HOST", "10.97.0.1").replace("eth0", "cable"))
    ]
    launchers = [command for command in told if "--nnodes" in command]
    assert len(launchers) == len(two_hosts)
    logs = [tmp_path / f"{host}.log" for host in two_hosts]
    with ExitStack() as stack:
        processes = []
        for host, (setting, program, *words), log in zip(two_hosts, launchers, logs, strict=True):
            assert program == "torchrun"
            places = dict([setting.split("=")], OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
            process = CONTEXT.Process(
                target=enter, args=(places, str(log), host, torchrun, str(tmp_path), words)
            )
            process.start()
            stack.callback(process.join, 40)
            stack.callback(process.terminate)  # torchrun ends its workers
            processes.append(process)

        (alone,) = (command for command in told if "runs/one" in command)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as left:
            main(alone[1:])
        assert left.value.code == 0

        end = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(end - time.monotonic(), 0.0))
        said = "\n".join(log.read_text(errors="replace") for log in logs)
        assert [process.exitcode for process in processes] == [0, 0], said
    first, second = (log.read_text() for log in logs)
    assert "Components by stage: " in first
    assert "test accuracy" in first
    assert "test accuracy" not in second
    (same,) = (block.code for block in page if "trained(" in block.code and block.kind == "python")
    assert '"runs/two"' in same
    exec(compile(same.replace('"runs/two"', '"runs/hosts"'), PAGE, "exec"), {})
