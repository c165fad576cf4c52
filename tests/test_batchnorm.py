"""DualBatchNorm: conversion, branches, state, copies, checkpointing, compile, SyncBatchNorm."""

import copy
import io
import pickle

import published
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clae_fast import (
    DualBatchNorm,
    DualBatchNorm1d,
    DualBatchNorm2d,
    DualBatchNorm3d,
    DualSyncBatchNorm,
    batchnorm_branch,
    clae_step,
    convert_dual_batchnorm,
    strip_dual_batchnorm,
)
from clae_fast.sync_batchnorm import SyncBatchNorm


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
        nn.BatchNorm1d(5, momentum=0.3, affine=False),
    )  # fmt: skip


def batch(B=8):
    return torch.randn(B, 3, 4, 4)


def run(model, x, branch):
    with batchnorm_branch(model, branch):
        return model(x)


def test_conversion_keeps_the_objects():
    model = net()
    parameters, layers = list(model.parameters()), list(model.modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fired = []
    model[1].register_forward_hook(lambda *a: fired.append(1))
    x = batch()
    expected = copy.deepcopy(model)(x)
    fired.clear()
    assert convert_dual_batchnorm(model) is model
    assert [m for m in model.modules() if m in layers] == layers
    assert all(any(p is q for q in model.parameters()) for p in parameters)
    assert isinstance(model[1], DualBatchNorm2d)
    assert isinstance(model[5], DualBatchNorm1d)
    assert isinstance(model[5], nn.BatchNorm1d)
    assert model[1].momentum == 0.1
    assert model[5].momentum == 0.3
    assert model[1].aux.momentum == model[5].aux.momentum == 0.01
    now = model.state_dict()
    assert {k for k in now if ".aux." not in k} == set(state)
    assert all(torch.equal(now[k], v) for k, v in state.items())
    for k, v in state.items():
        if k.startswith(("1.", "5.")):
            assert torch.equal(now[k.replace(".", ".aux.", 1)], v)  # aux starts as a copy
    assert torch.equal(model(x), expected)
    assert fired == [1]
    assert convert_dual_batchnorm(model) is model  # again: nothing to do
    assert set(model.state_dict()) == set(now)


def test_branches_are_separate():
    model = convert_dual_batchnorm(net(), momentum=0.5)
    with torch.no_grad():
        model[1].aux.weight.mul_(3)
    twin = copy.deepcopy(model)
    x = batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = run(model, x, "aux")
    h = twin[0](x)
    aux = twin[1].aux
    expected = nn.functional.batch_norm(h, aux.running_mean, aux.running_var, aux.weight, aux.bias,
                                        True, 0.5)  # fmt: skip
    assert torch.equal(run(model[:2], x, "aux"), expected)
    after = model.state_dict()
    for k, v in before.items():
        assert torch.equal(after[k], v) == (".aux." not in k or "weight" in k or "bias" in k), k
    out.sum().backward()
    assert model[1].weight.grad is None
    assert model[1].aux.weight.grad is not None
    assert model[0].weight.grad is not None


def test_branch_nests_and_comes_back():
    model = convert_dual_batchnorm(net())

    def fail():
        with batchnorm_branch(model, "aux"):
            with batchnorm_branch(model, "main"):
                assert model[1].branch == "main"
            assert model[1].branch == "aux"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model[1].branch == "main"
    assert "branch=main" in repr(model)


def test_strip_is_the_inverse():
    model = net()
    reference = copy.deepcopy(model)
    convert_dual_batchnorm(model)
    x = batch()
    run(model, x, "aux")
    assert strip_dual_batchnorm(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert list(model.state_dict()) == list(reference.state_dict())
    assert vars(model[1]).keys() == vars(reference[1]).keys()
    assert not model._load_state_dict_pre_hooks
    assert torch.equal(model(x), reference(x))
    model.load_state_dict(reference.state_dict())
    assert not any(isinstance(m, DualBatchNorm) for m in convert_then_strip().modules())


def convert_then_strip():
    return strip_dual_batchnorm(convert_dual_batchnorm(nn.BatchNorm3d(2)))


def test_a_batchnorm_alone_and_shared_layers():
    alone = nn.BatchNorm3d(2)
    assert convert_dual_batchnorm(alone) is alone
    assert isinstance(alone, DualBatchNorm3d)
    shared = nn.BatchNorm1d(4)
    model = convert_dual_batchnorm(nn.Sequential(shared, nn.Linear(4, 4), shared))
    assert model[0] is model[2]
    assert len(list(model.state_dict())) == 22  # both names of the shared one, and the linear
    run(model, torch.randn(6, 4), "aux")
    assert model[0].aux.num_batches_tracked == 2
    base = net()
    fresh = copy.deepcopy(base)
    fresh[5] = fresh[5].__class__(5, track_running_stats=False)
    run(convert_dual_batchnorm(fresh), batch(), "aux")


def test_a_dual_layer_made_directly():
    """As any layer, with its aux; converting, switching and stripping know it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DualBatchNorm2d(4, momentum=0.2, aux_momentum=0.5))
    assert model[1].momentum == 0.2
    assert model[1].aux.momentum == 0.5
    assert convert_dual_batchnorm(model)[1].aux.momentum == 0.5
    run(model, batch(), "aux")
    assert model[1].aux.num_batches_tracked == 1
    assert type(strip_dual_batchnorm(model)[1]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="DualBatchNorm has no BatchNorm of a dimension"):
        DualBatchNorm(4)


def test_unknown_subclasses_are_named_and_nothing_is_converted():
    class Special(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Special(3)))
    with pytest.raises(TypeError, match=r"'1\.0'.*Special is a BatchNorm subclass"):
        convert_dual_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="LazyBatchNorm2d"):
        convert_dual_batchnorm(nn.LazyBatchNorm2d())


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5, "0.1", True])
def test_wrong_momentum(momentum):
    with pytest.raises(ValueError, match="momentum must be None or a number in"):
        convert_dual_batchnorm(net(), momentum=momentum)


def test_converting_in_eval_mode():
    model = convert_dual_batchnorm(net().eval())
    before = model[1].aux.running_mean.clone()
    run(model, batch(), "aux")
    assert torch.equal(model[1].aux.running_mean, before)
    assert not model[1].aux.training


def test_a_changed_dual_layer_is_not_stripped():
    model = convert_dual_batchnorm(net())
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(TypeError, match="cannot strip '1': Parametrized"):
        strip_dual_batchnorm(model)
    run(model, batch(), "aux")
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert type(strip_dual_batchnorm(model)[1]) is nn.BatchNorm2d


def test_wrong_models_and_branches():
    model = convert_dual_batchnorm(net())
    with pytest.raises(ValueError, match="branch must be one of .*got 'adv'"):
        run(model, batch(), "adv")
    with pytest.raises(
        ValueError, match=r"'1' is a BatchNorm2d without a usable aux.*convert_dual"
    ):
        run(net(), batch(), "main")
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        convert_dual_batchnorm(3)
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        strip_dual_batchnorm(None)
    with batchnorm_branch(nn.Linear(2, 2), "aux"):
        pass


def test_sync_batchnorm_order():
    """Sync first, then dual; the other way round leaves an orphan aux, and says so."""
    right = convert_dual_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(net()))
    assert isinstance(right[1], DualSyncBatchNorm)
    assert isinstance(right[1], SyncBatchNorm)
    assert type(right[1].aux) is SyncBatchNorm  # ours: it trains on the CPU too
    x = batch()
    right.eval()
    assert torch.equal(run(right, x, "aux"), run(right, x, "main"))
    strip_dual_batchnorm(right)
    assert type(right[1]) is nn.SyncBatchNorm
    wrong = nn.SyncBatchNorm.convert_sync_batchnorm(convert_dual_batchnorm(net()))
    with pytest.raises(ValueError, match=r"convert_sync_batchnorm first, then convert_dual"):
        run(wrong, x, "main")


def test_copies():
    """deepcopy, pickle and torch.save of a converted model, in the middle of a branch too."""
    model = convert_dual_batchnorm(net())
    run(model, batch(), "aux")
    x = batch()
    with batchnorm_branch(model, "aux"):
        clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        clones.append(torch.load(buffer, weights_only=False))
        expected = copy.deepcopy(model)(x)
    for clone in clones:
        assert clone[1].branch == "aux"
        assert torch.equal(clone(x), expected)
        state = {k: v for k, v in clone.state_dict().items() if ".aux." not in k}
        clone.load_state_dict(state)  # the copy seeds its own aux
        assert torch.equal(clone[1].aux.running_mean, clone[1].running_mean)
        strip_dual_batchnorm(clone)
        assert not clone._load_state_dict_pre_hooks


def ordinary_checkpoint():
    source = net()
    source(batch()), source(batch())
    with torch.no_grad():
        source[1].weight.uniform_()
    return source.state_dict()


@pytest.mark.parametrize("assign", [False, True])
def test_loading_an_ordinary_checkpoint(assign):
    """Strictly; aux is seeded from main, and is no alias of it."""
    state = ordinary_checkpoint()
    model = convert_dual_batchnorm(net())
    run(model, batch(), "aux")
    before = set(state)
    model.load_state_dict(state, assign=assign)
    assert set(state) == before
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        main, aux = getattr(model[1], name), getattr(model[1].aux, name)
        assert torch.equal(main, state[f"1.{name}"])
        assert torch.equal(aux, main)
        assert aux.data_ptr() != main.data_ptr()


def test_loading_into_a_part_and_into_a_wrapper():
    state = ordinary_checkpoint()
    wrapper = nn.Module()
    wrapper.encoder = convert_dual_batchnorm(net())
    wrapper.load_state_dict({f"encoder.{k}": v for k, v in state.items()})
    assert torch.equal(wrapper.encoder[1].aux.running_mean, state["1.running_mean"])
    whole = nn.Sequential(net(), nn.Linear(5, 2))
    convert_dual_batchnorm(whole)
    whole[0].load_state_dict(state)
    assert torch.equal(whole[0][1].aux.running_mean, state["1.running_mean"])
    whole[0][1].load_state_dict(nn.BatchNorm2d(4).state_dict())
    assert (whole[0][1].aux.running_mean == 0).all()


def test_partly_missing_aux_keys_are_reported():
    model = convert_dual_batchnorm(net())
    full = model.state_dict()
    for missing in (["1.aux.weight"], [k for k in full if k.startswith("5.aux.")]):
        state = {k: v for k, v in full.items() if k not in missing}
        with pytest.raises(RuntimeError, match=missing[0].replace(".", r"\.")):
            model.load_state_dict(state)
        result = model.load_state_dict(state, strict=False)
        # torch itself forgives a missing counter of batches
        assert result.missing_keys == [k for k in missing if "tracked" not in k]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net().load_state_dict(full)


class Checkpointed(nn.Module):
    def __init__(self, body, **options):
        super().__init__()
        self.body, self.options = body, options

    def forward(self, x):
        return checkpoint(self.body, x, **self.options)


def test_activation_checkpointing_remembers_the_branch():
    """A CLAE step through a checkpointed encoder: the gradients of the plain one, bit for bit."""
    plain = published.small_encoder()
    inner = copy.deepcopy(plain)
    for layer in (3, 4):
        inner[layer] = Checkpointed(inner[layer], use_reentrant=False)
    outer = Checkpointed(copy.deepcopy(plain), use_reentrant=False)
    nested = Checkpointed(copy.deepcopy(inner), use_reentrant=False)
    x_i, x_j = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    expected = clae_step(plain, x_i, x_j)
    expected.loss.backward()
    grads = [p.grad for p in plain.parameters()]
    for model in (inner, outer, nested):
        out = clae_step(model, x_i, x_j)
        with batchnorm_branch(model, "aux"):  # whatever the branch is now
            out.loss.backward()
            dual = [m for m in model.modules() if isinstance(m, DualBatchNorm)]
            assert all(m.branch == "aux" for m in dual)
        assert torch.equal(out.x_adv, expected.x_adv)
        assert torch.equal(out.loss, expected.loss)
        for a, p in zip(grads, model.parameters(), strict=True):
            assert torch.equal(a, p.grad)
        assert all(getattr(m, "branch", "main") == "main" for m in model.modules())


def test_reentrant_checkpointing_is_refused():
    model = convert_dual_batchnorm(net())
    x = batch().requires_grad_()
    with batchnorm_branch(model, "aux"):
        out = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.sum().backward()


def test_branch_switched_inside_a_checkpoint_is_refused():
    model = convert_dual_batchnorm(net())

    def both(x):
        return model(x) + run(model, x, "aux")

    with pytest.raises(RuntimeError, match="put the checkpoint inside the `with`"):
        checkpoint(both, batch(), use_reentrant=False)


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    """Both branches, one compiled model: the numbers and the statistics of eager."""
    torch._dynamo.reset()
    eager = published.small_encoder().train(training)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True)
    for branch in ("main", "aux", "main", "aux"):
        x = torch.randn(4, 3, 8, 8)
        a, b = run(eager, x, branch), run(compiled, x, branch)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a.square().sum().backward(), b.square().sum().backward()
    for p, q in zip(eager.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[key], rtol=1e-4, atol=1e-5)
