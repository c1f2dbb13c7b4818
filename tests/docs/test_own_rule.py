"""The rule of the tutorial keeps the promises it is put to, and breaks the one that the page names."""

import os
import subprocess
import sys

import pytest

from .pages import DOCS, ROOT, blocks

FILES = ("test_scales.py", "test_no_trace.py")


@pytest.mark.timeout(300)
def test_the_rule_passes_and_without_its_damping_fails_where_the_page_says(tmp_path):
    codes = [block.code for block in blocks(DOCS / "tutorials" / "your-rule.md")]
    whole, case = (
        next(code for code in codes if code.startswith(f"# {name}.py\n"))
        for name in ("layer_rate", "layer_rate_case")
    )
    broken = whole.replace(" + self.eps", "")
    assert broken != whole
    assert len(whole.splitlines()) <= 40
    (tmp_path / "layer_rate.py").write_text(whole)
    (tmp_path / "layer_rate_case.py").write_text(case)
    (tmp_path / "broken_rate.py").write_text(broken)
    command = [sys.executable, "-m", "pytest", "-q", *(f"tests/contract/{name}" for name in FILES)]
    rules = ["--plywise-rule=layer_rate_case:case", "--plywise-rule=broken_rate:make"]
    own = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *rules],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    assert all("broken_rate:make" in line for line in failed), failed
    assert any("test_every_solve_ends[broken_rate:make-zeros-convnet]" in line for line in failed), failed
