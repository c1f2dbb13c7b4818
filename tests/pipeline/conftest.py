"""Processes for the pipeline's tests, started once and never left behind, and hosts to run them on."""

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from .crew import Crew
from .fleet import free_port


@pytest.fixture(scope="package")
def crew() -> Iterator[Crew]:
    """Four processes that do one job after another."""
    made = Crew()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.97.0.1 and 10.97.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need iproute2's `ip`")
    hosts = tuple(f"plywise{number}x{free_port()}" for number in (1, 2))
    first, second = hosts
    try:
        for command in (
            f"netns add {first}",
            f"netns add {second}",
            f"-n {first} link add cable type veth peer name cable netns {second}",
            f"-n {first} addr add 10.97.0.1/24 dev cable",
            f"-n {second} addr add 10.97.0.2/24 dev cable",
            *(f"-n {host} link set {device} up" for host in hosts for device in ("lo", "cable")),
        ):
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=30)
            if done.returncode:
                pytest.skip(f"two hosts need network namespaces: ip {command}: {done.stderr.strip()}")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, timeout=30)
