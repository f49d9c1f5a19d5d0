"""A model as the denoiser of a batch: conditions, clamping."""

import pytest
import torch

from cm.config.scripts import SampleConfig
from cm.diffusion.denoiser import Denoiser
from cm.errors import UserError
from cm.models.files import choose_weights
from cm.models.pretrained import Model
from tests.helpers.analytic import free

X, SIGMA = torch.tensor([[0.5], [3.0]]), torch.ones(2)


def model(class_cond):
    """A network that returns x + 10 y, or x."""

    def net(x, sigma, y=None):
        return x if y is None else x + 10 * y[:, None]

    return Model(SampleConfig(class_cond=class_cond), Denoiser(net, free), torch.device("cpu"))


def test_labels_reach_a_class_conditional_network():
    denoise = model(True).denoise(torch.tensor([1, 0]), clip=False)
    assert denoise(X, SIGMA).tolist() == [[10.5], [3.0]]
    with pytest.raises(ValueError, match="needs the labels"):
        model(True).denoise()


def test_a_folder_without_weights_is_no_model():
    with pytest.raises(UserError, match="data/photos holds no weights of a model"):
        choose_weights(["manifest.json"], "", "data/photos")


def test_an_unconditional_model_ignores_labels():
    for labels in (None, torch.tensor([1, 0])):
        assert model(False).denoise(labels, clip=False)(X, SIGMA).tolist() == X.tolist()


def test_predictions_are_clamped_unless_asked_otherwise():
    assert model(False).denoise()(X, SIGMA).tolist() == [[0.5], [1.0]]
    assert model(True).denoise(torch.tensor([0, -1]))(X, SIGMA).tolist() == [[0.5], [-1.0]]
