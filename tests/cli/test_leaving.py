"""The messages of a command if the user's code ends its process or leaves threads."""

import os

import pytest

from processes import ForkedCommand

LEAVING = """
import sys, threading, time
from torch import nn

class Leaving(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        sys.exit(0)

class Threaded(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
        threading.Thread(target=time.sleep, args=(600,), name="saver").start()
"""


def test_a_model_that_calls_sys_exit_is_named(plywise, user_module):
    user_module("leaving", LEAVING)
    code, _, err = plywise("train", "--model", "leaving:Leaving", "--blocks", "1", "--epochs", "1")
    assert code == 1
    assert "called sys.exit(0) (line 10 of leaving.py), and the command ends unfinished" in err


LEAVING_AT_ONCE = """
import os, threading
from torch import nn

class Leaving(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        os._exit(0)

class Watched(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
        watch = threading.Thread(target=lambda: os._exit(0))
        watch.start()
        watch.join()

class Forked(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
        if os.fork() == 0:
            os._exit(0)
"""


@pytest.mark.parametrize("command", ["train", "explain"])
def test_a_model_that_calls_os_exit_is_named(plywise, user_module, command):
    user_module("leaving", LEAVING_AT_ONCE)
    given = ["leaving:Leaving"] if command == "explain" else ["--model", "leaving:Leaving", "--blocks", "1"]
    before = os._exit
    code, _, err = plywise(command, *given, "--data", "digits")
    assert code == 1
    assert "called os._exit(0) (line 10 of leaving.py), and the command ends unfinished" in err
    assert os._exit is before


def test_a_thread_that_ends_the_process_is_named_and_a_forked_process_may_end(user_module):
    user_module("leaving", LEAVING_AT_ONCE)
    command = ForkedCommand(["plywise", "explain", "leaving:Watched", "--data", "digits"])
    _, err = command.communicate(timeout=120)
    assert command.returncode == 1
    assert "called os._exit(0) (line 15 of leaving.py), and the command ends unfinished" in err
    command = ForkedCommand(["plywise", "explain", "leaving:Forked", "--data", "digits"])
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, err
    assert out.count("100 % of 650 parameters") == 1, out


def test_threads_that_a_model_leaves_do_not_keep_the_command_for_ever(user_module, tmp_path):
    user_module("leaving", LEAVING)
    command = ForkedCommand(["plywise", "train", "--model", "leaving:Threaded", "--blocks", "1"])
    _, err = command.communicate(timeout=120)
    assert command.returncode == 0
    assert "threads that your code has started still run 5 s after the end: saver." in err
