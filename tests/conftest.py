"""Shared set-up: fixed seeds, names for the docstring examples."""

import dataclasses
import os

import pytest
import torch
from torch import nn

import clae_fast

if not torch.cuda.is_available():  # before a test imports triton
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    """What only a GPU can run is left out where there is none, and counted."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if "gpu_only" in item.keywords]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if "gpu_only" not in item.keywords]
    if left_out:
        config.left_out = len(left_out)


def pytest_terminal_summary(terminalreporter, config):
    if count := getattr(config, "left_out", 0):
        terminalreporter.write_line(f"{count} tests need a GPU (tests/test_gpu.py): not run here")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mnist_subset(every):
    """Every `every`-th training image and every 10th test image: all digits."""
    from clae_fast.pretraining import mnist5k

    data = mnist5k()
    return dataclasses.replace(
        data,
        train_images=data.train_images[::every],
        train_labels=data.train_labels[::every],
        test_images=data.test_images[::10],
        test_labels=data.test_labels[::10],
    )


@pytest.fixture(scope="session")
def subset():
    """125 training images."""
    return mnist_subset(32)


@pytest.fixture(scope="session")
def larger_subset():
    """250 training images."""
    return mnist_subset(16)


@pytest.fixture(scope="session")
def four():
    """Four processes of one group; see processes.py."""
    from processes import Processes

    processes = Processes(4)
    yield processes
    processes.close()


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace):
    doctest_namespace.update({name: getattr(clae_fast, name) for name in clae_fast.__all__})
    doctest_namespace.update(torch=torch, nn=nn, clae_fast=clae_fast)
