"""The attack as a CUDA graph, with a recorder of operators in place of CUDA's."""

import copy

import pytest
import recorded_graph
import torch
from torch import nn

from clae_fast import (
    GraphedAttack,
    InfoNCELoss,
    NTXentLoss,
    UELLoss,
    clae_step,
    convert_dual_batchnorm,
    graphed,
)
from clae_fast.pretraining import ConfigError, PretrainConfig, pretrain


@pytest.fixture
def recorder(monkeypatch):
    """Counts recordings and replays; recording leaves no trace in buffers, as on a GPU."""
    counts = {"records": 0, "replays": 0}
    encoders = []

    def record(function, device):
        counts["records"] += 1
        kept = [(b, b.clone()) for e in encoders for b in e.buffers()]
        replay, result = recorded_graph.record(function, device)
        for buffer, value in kept:
            buffer.copy_(value)
        result.fill_(torch.nan)  # recording computes nothing

        def counted():
            counts["replays"] += 1
            replay()

        return counted, result

    monkeypatch.setattr(graphed, "DEVICE", "cpu")
    monkeypatch.setattr(graphed, "record", record)
    counts["encoders"] = encoders
    return counts


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16)
    )
    return convert_dual_batchnorm(net)


def train(encoder, batches, attack, loss, autocast=False):
    """Steps of SGD; what every attack and loss was."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for x_i, x_j in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = clae_step(encoder, x_i, x_j, loss=loss, eps=0.05, attack=attack)
        out.loss.backward()
        optimizer.step()
        seen.append((out.x_adv, out.loss.detach()))
    return seen


def batches(sizes):
    torch.manual_seed(1)
    return [(torch.rand(n, 3, 8, 8), torch.rand(n, 3, 8, 8)) for n in sizes]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss", [None, InfoNCELoss(0.1), UELLoss(0.1)], ids=str)
def test_replayed_as_exact(recorder, loss, autocast):
    """Bit for bit through training: weights and both statistics move between the replays."""
    encoder = network()
    other = copy.deepcopy(encoder)
    recorder["encoders"].append(other)
    data = batches([6] * 8 + [3] * 5 + [6])  # the shorter ones run as "exact"
    exact = train(encoder, data, "exact", loss, autocast)
    replayed = train(other, data, GraphedAttack(), loss, autocast)
    for (x, value), (x_again, value_again) in zip(exact, replayed, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(value, value_again)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert recorder["records"] == 1
    assert recorder["replays"] == 8 - graphed.WARM_UP + 1


def test_what_is_recorded_anew(recorder):
    encoder, attack = network(), GraphedAttack()
    recorder["encoders"].append(encoder)
    data = batches([6] * 5)
    train(encoder, data, attack, None)
    assert (recorder["records"], recorder["replays"]) == (1, 2)
    encoder[4].weight = nn.Parameter(encoder[4].weight.detach() * 2)  # elsewhere in memory
    want = train(copy.deepcopy(encoder), data, "exact", None)
    got = train(encoder, data, attack, None)
    assert (recorder["records"], recorder["replays"]) == (2, 4)
    for (x, _), (x_again, _) in zip(want, got, strict=True):
        assert torch.equal(x, x_again)


@pytest.mark.parametrize("change", ["mode", "one layer", "momentum", "temperature", "backend"])
def test_what_is_another_computation(recorder, change):
    """Not replayed, and right; replayed again when it is as it was."""
    encoder, attack, loss = network(), GraphedAttack(), NTXentLoss(0.5)
    recorder["encoders"].append(encoder)
    data = batches([6] * 5)
    train(encoder, data, attack, loss)
    replays = recorder["replays"]
    assert replays == 2
    where, name, other = {
        "mode": (encoder, "training", False),
        "one layer": (encoder[1], "training", False),
        "momentum": (encoder[1].aux, "momentum", 0.5),
        "temperature": (loss, "temperature", 0.01),
        "backend": (loss, "backend", "reference"),
    }[change]
    was = getattr(where, name)
    setattr(where, name, other)
    twin = copy.deepcopy(encoder)
    want, got = train(twin, data[:1], "exact", loss), train(encoder, data[:1], attack, loss)
    assert torch.equal(want[0][0], got[0][0])
    for key, value in twin.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[key]), key
    assert recorder["replays"] == replays
    setattr(where, name, was)
    twin = copy.deepcopy(encoder)
    want, got = train(twin, data[:1], "exact", loss), train(encoder, data[:1], attack, loss)
    assert torch.equal(want[0][0], got[0][0])
    assert recorder["replays"] == replays + 1


def test_a_temperature_that_always_moves_leaves_nothing_behind(recorder):
    encoder, attack, loss = network(), GraphedAttack(), NTXentLoss(0.5)
    for x_i, x_j in batches([6] * 25):
        loss.temperature *= 0.99
        clae_step(encoder, x_i, x_j, loss=loss, attack=attack)
    assert recorder["records"] == 0
    assert len(attack._attacks) <= graphed.MOST_KINDS + 1


def test_images_that_require_grad_leave_no_trace(recorder):
    encoder, attack = network(), GraphedAttack()
    recorder["encoders"].append(encoder)
    for x_i, x_j in batches([6] * 6):
        weight = torch.ones((), requires_grad=True)
        clae_step(encoder, x_i * weight, x_j, attack=attack)
    assert recorder["replays"] == 3
    assert not attack._x.requires_grad
    attack.reset()
    train(encoder, batches([6] * 5), attack, None)
    assert (recorder["records"], recorder["replays"]) == (2, 5)


def test_what_is_refused(recorder, monkeypatch):
    attack, data = GraphedAttack(), batches([6] * 5)
    train(network(), data[:1], attack, None)
    with pytest.raises(ValueError, match="has served another encoder: make a new one"):
        train(network(), data[:1], attack, None)
    attack, encoder = GraphedAttack(), network()
    train(encoder, data[:1], attack, None)
    with pytest.raises(ValueError, match="has served another loss"):
        train(encoder, data[:1], attack, NTXentLoss(0.5))

    class Asks(nn.Module):
        def forward(self, x):
            return x.flatten(1) * (1.0 if x.sum().item() > 0 else 2.0)

    attack, encoder = GraphedAttack(), Asks()
    for x_i, x_j in data[:3]:
        clae_step(encoder, x_i, x_j, attack=attack)
    with pytest.raises(
        RuntimeError, match=r'cannot be recorded .*: start anew with attack="exact"'
    ):
        clae_step(encoder, *data[3], attack=attack)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"needs images on a GPU, got x_i on cpu"):
        train(network(), data[:1], GraphedAttack(), None)


def test_in_pretraining():
    with pytest.raises(ConfigError, match="cuda_graph=True: expected a GPU, and the run"):
        pretrain(PretrainConfig(cuda_graph=True, device="cpu", epochs=1, batch_size=500))
    for other in ({"clae": False}, {"attack": "shared"}, {"accumulate": 2}):
        with pytest.raises(ConfigError, match="cuda_graph"):
            PretrainConfig(cuda_graph=True, **other)
