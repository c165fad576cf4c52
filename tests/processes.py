"""A few processes that wait for work: started once, as every start takes seconds.

`Processes(4).run(function, *args)` calls `function(rank, *args)` in each and returns what they
return. `function` is one at the top of a module that the processes can import.
"""

import atexit
import contextlib
import importlib
import os
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(rank, world, port, timeout, backend, pipe):
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    while (job := pipe.recv()) is not None:
        module, name, args = job
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it


class Processes:
    """Args: how many; the process group's timeout in seconds; its backend."""

    def __init__(self, world, timeout=60, backend="gloo"):
        context = mp.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        atexit.register(self.close)  # not daemons: those have no children
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world, port, timeout, backend, theirs)
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, within=60):
        """What `function(rank, *args)` returns on each rank; an exception is raised here."""
        answers = self.answers(function, *args, within=within)
        for rank, (good, answer) in enumerate(answers):
            assert good, f"rank {rank}: {answer}"
        return [answer for _, answer in answers]

    def answers(self, function, *args, within=60):
        """(True, result) or (False, traceback) of each rank; None from one that ended."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, args))
        return [self._answer(pipe, within) for pipe in self.pipes]

    def _answer(self, pipe, within):
        assert pipe.poll(within), f"no answer in {within} s"
        with contextlib.suppress(EOFError):
            return pipe.recv()
        return None

    def close(self):
        atexit.unregister(self.close)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def run(function, world, *args, within=120):
    """`function(rank, *args)` in `world` new processes: their results, rank first."""
    processes = Processes(world)
    try:
        return processes.run(function, *args, within=within)
    finally:
        processes.close()
