"""Shared set-up: fixed seeds, names for the docstring examples."""

import pytest
import torch
from torch import nn

import clae_fast


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace):
    doctest_namespace.update({name: getattr(clae_fast, name) for name in clae_fast.__all__})
    doctest_namespace.update(torch=torch, nn=nn, clae_fast=clae_fast)
