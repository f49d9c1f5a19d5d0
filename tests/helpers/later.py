"""Networks, roles and comparisons for the golden numbers of the later methods (tests/golden_later)."""

import torch
from torch import Tensor, nn

from cm.diffusion.weightings import make_weight
from cm.networks.edm2 import EDM2UNet
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
    state, edm2 = g.state_dict(f"net/{name}/sd/"), about["family"].startswith("edm2")
    side = about["image_size"]
    channels = state[f"enc.{side}x{side}_conv.weight"].shape[1] - edm2  # EDM2 adds one of ones
    same = {
        "image_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "model_channels": about["model_channels"],
        "channel_mult": tuple(about["channel_mult"]),
        "attention_resolutions": tuple(about["attn_resolutions" if edm2 else "attention_resolutions"]),
        "num_classes": about["num_classes"] or None,
    }
    if edm2:
        heads = about["channels_per_head"]
        net = EDM2UNet(**same, num_res_blocks=about["num_blocks"], num_head_channels=heads, logvar_channels=0)
    else:
        net = SongUNet(**same, num_res_blocks=about["num_res_blocks"], **FAMILIES[about["family"]])
    net.load_state_dict(state)
    return net.to(dtype).eval()


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


def pair_weight(weight_schedule: str, t: Tensor, r: Tensor | None, sigma_data: float) -> Tensor:
    """Loss weights (B,) by name of pairs t > r; r None: of single levels t."""
    return make_weight(weight_schedule, sigma_data)(t, r)
