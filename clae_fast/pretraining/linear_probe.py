"""Linear classifiers on frozen features, each feature computed once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .probe import check_features


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy of a linear probe.

    `accuracy` is that at the end. For the Adam probe `history` holds the test accuracy after each
    epoch, and `best` at `best_epoch` (from 1) the largest: chosen on the test images, as published
    results are, so an optimistic figure. `converged` is False where the solver gave up early.
    """

    accuracy: float
    best: float | None = None
    best_epoch: int | None = None
    history: tuple[float, ...] = ()
    converged: bool = True


def logistic_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    c: float = 1.0,
    max_iter: int = 1000,
) -> ProbeResult:
    """scikit-learn's multinomial logistic regression on standardised features.

        min_W  1/2 |W|^2 + c sum_n -log softmax(W x_n + b)_{y_n}

    Args:
        train_features: (N, F) features.
        train_labels: (N,) int64, at least two classes.
        test_features: (M, F); every one is counted.
        test_labels: (M,) int64.
        c: inverse strength of the penalty.
        max_iter: of L-BFGS.

    Raises:
        ValueError: naming the argument.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check(train_features, train_labels, test_features, test_labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iter))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_features.numpy(), train_labels.numpy())
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    accuracy = float(model.score(test_features.numpy(), test_labels.numpy()))
    return ProbeResult(accuracy, converged=converged)


def adam_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    epochs: int = 1000,
    batch_size: int = 256,
    lr: float = 3e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] | None = None,
) -> ProbeResult:
    """The probe of CLAE's published evaluation: one linear layer, Adam, cross-entropy.

    The published code runs the frozen encoder again in each epoch and leaves out the last, shorter
    batch of training and test images; here every feature is computed once and every image counts.
    The global random state is left alone.

    Args:
        train_features: (N, F) features.
        train_labels: (N,) int64, 0 to C-1.
        test_features: (M, F).
        test_labels: (M,) int64; a class that train lacks counts as wrong.
        epochs: passes over the training features.
        batch_size: features in a step.
        lr: of Adam.
        seed: fixes weights and order.
        device: where to train.
        progress: called after each epoch.

    Raises:
        ValueError: naming the argument.

    Source: the published code of Ho & Vasconcelos, NeurIPS 2020, `SimCLR/eval_lr.py`.
    """
    _check(train_features, train_labels, test_features, test_labels)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    device = torch.device(device)
    train_features, train_labels, test_features, test_labels = (
        t.to(device)
        for t in (train_features.float(), train_labels, test_features.float(), test_labels)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Linear(train_features.shape[1], int(train_labels.max()) + 1).to(device)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=True)
    correct = []
    for _ in range(epochs):
        permutation = torch.randperm(len(train_features), generator=order).to(device)
        for chosen in permutation.split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(train_features[chosen]), train_labels[chosen])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            correct.append((model(test_features).argmax(1) == test_labels).sum())
        if progress is not None:
            progress()
    history = tuple(n / len(test_features) for n in torch.stack(correct).tolist())
    best = max(history)
    return ProbeResult(history[-1], best, history.index(best) + 1, history)


def _check(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
) -> None:
    check_features("train", train_features, train_labels)
    check_features("test", test_features, test_labels)
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features: expected width {train_features.shape[1]}, that of train_features, "
            f"got {test_features.shape[1]}"
        )
    if len(train_labels.unique()) < 2:
        raise ValueError("train_labels: expected at least two classes, got one")
