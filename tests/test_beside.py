"""Collection of the tests in `tests/beside`, which need other node packs."""

import os
import subprocess
import sys

import pytest

from tests.method_helpers import ROOT


def collect(*packs):
    """Return pytest's exit code and output with these pack folders in `COVE_PACKS`."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/beside"]
    environment = os.environ | {"COVE_PACKS": os.pathsep.join(map(str, packs))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_beside_without_packs_collects_nothing():
    code, output = collect()
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED, output


def test_beside_with_a_pack_collects_every_file(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "comfyui-kjnodes"\n', encoding="utf-8")
    code, output = collect(tmp_path)
    assert code == pytest.ExitCode.OK, output
    for file in (ROOT / "tests" / "beside").glob("test_*.py"):
        assert file.name in output
