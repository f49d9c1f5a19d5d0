"""Networks, roles and comparisons for the golden numbers of the later methods (tests/golden_later)."""

import torch
from torch import Tensor, nn

from cm.config.rows import NETWORKS
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import Precond
from cm.networks.song_unet import SongUNet
from tests.helpers.golden_data import GoldenFile

# How the public networks of each family differ
FAMILIES = {
    "ncsnpp": dict(embedding="fourier", embedding_mult=2, taps=(1, 3, 3, 1), input_pyramid=True),
    "ddpmpp": dict(embedding="positional", embedding_mult=1, taps=(1, 1), input_pyramid=False),
}


def network(g: GoldenFile, name: str, dtype: torch.dtype = torch.float64, described: str = "") -> nn.Module:
    """A stored network in eval mode. described: the entry of the file's `networks`, where it has another name."""
    about = g.config["networks"][described or name]
    state = {key: value for key, value in g.state_dict(f"net/{name}/sd/").items()}
    channels = state[f"enc.{about['image_size']}x{about['image_size']}_conv.weight"].shape[1]
    net = SongUNet(
        image_size=about["image_size"],
        in_channels=channels,
        out_channels=channels,
        model_channels=about["model_channels"],
        channel_mult=tuple(about["channel_mult"]),
        num_res_blocks=about["num_res_blocks"],
        attention_resolutions=tuple(about["attention_resolutions"]),
        num_classes=about["num_classes"] or None,
        **FAMILIES[about["family"]],
    )
    net.load_state_dict(state)
    return net.to(dtype).eval()


def denoiser(net: nn.Module, precond: Precond) -> Denoiser:
    """A denoiser of a stored network."""
    return Denoiser(net, precond)


def labels(g: GoldenFile, prefix: str, net: nn.Module) -> dict[str, Tensor]:
    """{"y": ...} for a network with classes."""
    return {"y": g.tensor(f"{prefix}/y")} if net.num_classes else {}


def check_gradients(g: GoldenFile, prefix: str, net: nn.Module, tolerance: float) -> None:
    """The stored gradients within a tolerance of their largest number, and the norms of all where the file has them."""
    parameters = dict(net.named_parameters())
    names = g.keys(prefix)
    assert names
    for key in names:
        expected = g.tensor(key).double()
        found = parameters[key.removeprefix(prefix)].grad.double()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    # Stored norms are sums over whole tensors, so that no parameter is left out.
    case = prefix.split("/", 1)[1].rsplit("/", 2)[0]
    for name, norm in g.config.get("grad_norms", {}).get(case, {}).items():
        torch.testing.assert_close(parameters[name].grad.norm().item(), norm, rtol=10 * tolerance, atol=1e-9)


def known(name: str) -> bool:
    """Whether this library has a network."""
    return name in NETWORKS
