"""Two processes: what each gets from ours is what it gets from theirs, gradients included."""

import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent / "two_processes.py"


def test_two_processes(tmp_path):
    """lightly, open_clip in each of its combinations, sentence-transformers, solo-learn."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == []
