"""The original's evaluator object, and the small classifier."""

import sys

import numpy as np
import pytest
import torch

from cm.data.images import to_uint8
from cm.errors import UserError
from cm.storage.weights import load_weights, save_weights
from evaluations import small_classifier
from evaluations.features import ClassifierFeatures, load_features
from evaluations.fid import frechet_distance
from evaluations.inception_score import inception_score
from evaluations.small_classifier import load_classifier, to_network_range, train_classifier
from evaluations.th_evaluator import FIDAndIS, FIDStatistics
from tests.helpers import golden_data
from tests.helpers.eval_files import stripes, write_classifier, write_npz
from tests.helpers.inception_files import rule_network, write_openai
from tests.helpers.mp import run_ranks


@pytest.fixture(scope="module")
def metric(tmp_path_factory) -> FIDAndIS:
    path = write_openai(tmp_path_factory.mktemp("weights") / "i.pt")
    return FIDAndIS(softmax_batch_size=2, path=str(path))


def test_signatures(metric):
    import inspect

    import evaluations.th_evaluator as module

    for name, methods in golden_data.json("signatures")["evaluations.th_evaluator"].items():
        for method, parameters in methods.items():
            found = list(inspect.signature(getattr(getattr(module, name), method)).parameters)
            assert found[1:] == parameters, (name, method)


def test_get_preds_quantises_as_samples_on_disk(metric):
    images = golden_data.load("evaluation").tensor("inception/float40/images_nchw_pm1")
    pool, spatial = metric.get_preds(images)
    expected = rule_network()(to_uint8(images).permute(0, 3, 1, 2).float())
    torch.testing.assert_close((pool, spatial), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="CLIP"):
        metric.get_preds(images, captions=["a", "b"])


def test_statistics_and_distance(metric):
    x, y = (np.random.default_rng(s).standard_normal((30, 4)) for s in (0, 1))
    a, b = metric.get_statistics(x, 8), metric.get_statistics(y, 8)
    np.testing.assert_allclose(a.sigma, np.cov(x, rowvar=False), rtol=1e-10)
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert a.frechet_distance(b) == pytest.approx(expected)
    with pytest.raises(ValueError, match="8-px and 16-px"):
        a.frechet_distance(FIDStatistics(b.mu, b.sigma, 16))


def test_scores(metric):
    pool = torch.randn(7, 2048, generator=torch.Generator().manual_seed(0))
    weight = metric.inception.output.weight
    assert metric.get_inception_score(pool, split_size=4) == inception_score(pool, weight, 4)
    x = torch.eye(3)
    assert metric.get_clip_score(x, x) == 1 and metric.get_clip_score(x, -x) == -1
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        metric.get_clip_score(x, torch.eye(2))


class MeanColour(FIDAndIS):
    """The same object with features that are quick and tell images apart."""

    def __init__(self):
        self._references = {}

    def get_preds(self, batch, captions=None):
        features = batch.mean((2, 3)).repeat(1, 700)[:, :2048]
        return features, features[:, :2023]


def images_of(rows) -> torch.Tensor:
    return torch.stack([torch.full((3, 2, 2), row / 100) for row in rows])


def activations_of_rank() -> list | None:
    from cm.runtime.distributed import local_rows

    batches = ((images_of([10 * k + i for i in local_rows(10)]), {}) for k in range(9))
    found = MeanColour().get_activations(batches, 24, 10, pr_samples=5)
    return found and [[round(100 * float(v)) for v in part[:, 0]] for part in found]


def test_get_activations_takes_exactly_the_samples_it_is_asked_for():
    pool, spatial, first = activations_of_rank()
    assert pool == spatial == list(range(24)) and first == [0, 1, 2, 3, 4]


def test_get_activations_over_ranks():
    results = run_ranks("tests.evaluations.test_facade:activations_of_rank", 2)
    pool = results[0][0]  # of the last batch of 10, two images of each rank
    assert results[1] is None and sorted(pool) == [*range(20), 20, 21, 25, 26]


def test_virtual_batch_and_its_errors():
    batches = [images_of(range(k, k + 4)) for k in (0, 4)]
    found = MeanColour().get_virtual_batch(batches, 6, 4, 2)
    assert found.mu[0] == pytest.approx(np.mean(np.arange(6) / 100)) and found.resolution == 2
    assert found.sigma[0, 0] == pytest.approx(np.var(np.arange(6) / 100, ddof=1))
    with pytest.raises(ValueError, match="the data end 2 images before"):
        MeanColour().get_virtual_batch(batches, 10, 4, 2)
    with pytest.raises(ValueError, match="a batch of 4 images, 5 are"):
        MeanColour().get_virtual_batch(batches, 10, 5, 2)


def test_reference_batches(metric, tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.arange(2048.0), sigma=np.eye(2048))
    reference = metric.get_ref_batch(str(tmp_path / "r.npz"))
    assert reference.mu[5] == 5 and reference.resolution is None
    write_npz(tmp_path / "images.npz", 3)
    computed = metric.get_ref_batch(str(tmp_path / "images.npz"))
    assert computed.sigma.shape == (2048, 2048) and computed.resolution == 8


# --- small classifier ----------------------------------------------------------------------------


def test_training_is_a_function_of_its_arguments():
    images, labels = stripes(60)
    first, second, other = (train_classifier(images, labels, seed=s, epochs=1)[0] for s in (0, 0, 1))
    state = torch.random.get_rng_state()
    train_classifier(images, labels, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert not torch.equal(first.hidden.weight, other.hidden.weight)


@pytest.mark.parametrize("size, channels", [(8, 1), (16, 3)])
def test_it_learns_and_its_file_brings_it_back(tmp_path, size, channels):
    path = write_classifier(tmp_path / "c.pt", size=size, channels=channels)
    net, meta = load_classifier(str(path))
    assert (meta["image_size"], meta["channels"], meta["num_classes"]) == (size, channels, 4)
    images, labels = stripes(100, seed=7, size=size, channels=channels)
    features, logits = net(to_network_range(torch.from_numpy(images)))
    assert (logits.argmax(1).numpy() == labels).mean() > 0.9
    torch.testing.assert_close(logits, features @ net.output.weight.T)
    network = ClassifierFeatures(str(path), torch.device("cpu"))
    torch.testing.assert_close(network(torch.from_numpy(images))["pool"], features)
    if channels == 3:
        grey = torch.from_numpy(images[..., :1])
        torch.testing.assert_close(network(grey)["pool"], network(grey.expand(-1, -1, -1, 3))["pool"])


def test_files_that_are_not_classifiers(tmp_path):
    path = write_classifier(tmp_path / "c.pt")
    state, meta = load_weights(str(path))
    save_weights(tmp_path / "old.pt", state, meta | {"network": "digits"})  # of earlier versions
    assert load_features(f"digits={tmp_path / 'old.pt'}", "", torch.device("cpu")).classes == 4
    save_weights(tmp_path / "other.pt", state, None)
    with pytest.raises(UserError, match="not written by"):
        load_classifier(str(tmp_path / "other.pt"))
    save_weights(tmp_path / "layout.pt", {"a": torch.zeros(1)}, meta)
    with pytest.raises(UserError, match="does not fit the model"):
        load_classifier(str(tmp_path / "layout.pt"))
    with pytest.raises(UserError, match="SHA-256"):
        ClassifierFeatures(str(path), torch.device("cpu"), "0" * 8)


def test_classifier_command_line(tmp_path, monkeypatch, capsys):
    data = write_npz(tmp_path / "d.npz", 60)
    monkeypatch.setattr(sys, "argv", ["x", str(data), str(tmp_path / "c.pt"), "--epochs", "1"])
    small_classifier.main()
    assert "of 12 held-out images" in capsys.readouterr().out
    np.savez(data, arr_0=stripes(4)[0])
    with pytest.raises(UserError, match="needs labels"):
        small_classifier.main()
