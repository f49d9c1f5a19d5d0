"""JAX CIFAR-10 checkpoints: files built here, read without flax, equal to a numpy restatement of that network."""

import numpy as np
import pytest
import torch

from cm.errors import UserError
from cm.networks.architecture import build_network
from cm.storage.weights import load_weights
from cm.tools.convert import jax_cifar
from cm.tools.convert.formats import READERS, Source, convert, detect, known_flags
from cm.tools.convert.layout import architecture
from tests.helpers.flax_reference import Flax, in_order

msgpack = pytest.importorskip("msgpack")


def pack(value):
    """flax's encoding: arrays as extension 1, numpy scalars as 3."""
    if isinstance(value, np.ndarray | np.generic):
        content = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        return msgpack.ExtType(3 if isinstance(value, np.generic) else 1, content)
    raise TypeError(type(value))


def write(path, net: Flax, **changes) -> str:
    """A checkpoint file as the JAX code saves it."""
    state = {
        "step": np.int64(800000),
        "lr": 4e-4,
        "ema_rate": 0.9999,
        "params": {name: {"unused": np.zeros(1, np.float32)} for name in ("Dense_0",)},
        "params_ema": net.tree(),
        "model_state": {},
        "opt_state": {"0": {}, "1": {"count": np.int32(5)}},
        "rng_state": np.array([0, 42], np.uint32),
        **changes,
    }
    path.write_bytes(msgpack.packb(in_order(state), default=pack, strict_types=True))
    return str(path)


@pytest.fixture(scope="module", params=["ncsnpp", "ddpmpp"])
def example(request):
    """(network, NHWC images, c_noise, expected output)."""
    net = Flax(fourier=request.param == "ncsnpp")
    random = np.random.RandomState(1)
    x, c_noise = random.standard_normal((2, 32, 32, 3)), np.array([-1.2, 0.9])
    return request.param, net, x, c_noise, net(x, c_noise)


def test_converted_network_equals_the_restatement(tmp_path, example):
    kind, flax, x, c_noise, expected = example
    path = write(tmp_path / "checkpoint_80", flax)
    assert detect(path) == "jax"
    state, config = READERS["jax"](Source(path))
    assert (config["network"], config["num_channels"], config["channel_mult"]) == (kind, 8, "2,2,2")
    assert (config["image_size"], config["num_res_blocks"], config["attention_resolutions"]) == (32, 1, "16")
    net = build_network(architecture(config)).eval()
    assert list(state) == list(net.state_dict())
    net.load_state_dict(state)
    with torch.no_grad():
        out = net(
            torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2),
            torch.tensor(c_noise, dtype=torch.float32),
        )
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_converted_file_carries_its_configuration(tmp_path, example):
    path = write(tmp_path / "checkpoint_80", example[1])
    known = known_flags("cifar10_cd_lpips") if example[0] == "ncsnpp" else {"training_mode": "edm"}
    line = convert(Source(path), str(tmp_path / "new.pt"), "cm", known)
    assert "(jax)" in line and "(cm)" in line
    config = load_weights(tmp_path / "new.pt")[1]["config"]
    assert (config["training_mode"], config.get("steps")) == (known["training_mode"], known.get("steps"))
    assert config["network"] == example[0]
    with pytest.raises(UserError, match="does not say how it was trained: give --training_mode"):
        convert(Source(path), str(tmp_path / "other.pt"), "cm", {})


def test_a_network_with_ten_blocks_and_more_is_placed(tmp_path):
    """Sorted as text, block 10 stands before block 2."""
    flax = Flax(blocks=2)
    x, c_noise = np.random.RandomState(2).standard_normal((1, 32, 32, 3)), np.array([0.3])
    expected = flax(x, c_noise)
    state, config = READERS["jax"](Source(write(tmp_path / "c", flax)))
    net = build_network(architecture(config)).eval()
    net.load_state_dict(state)
    with torch.no_grad():
        out = net(torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2), torch.tensor(c_noise).float())
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_wanted_weights_are_read(tmp_path):
    ema, raw = Flax(seed=0), Flax(seed=1)
    for net in (ema, raw):
        net(np.zeros((1, 32, 32, 3)), np.zeros(1))
    path = write(tmp_path / "c", ema, params=raw.tree())
    bias = "Conv_0/bias"
    for weights, net in (("", ema), ("ema", ema), ("raw", raw)):
        state, _ = READERS["jax"](Source(path, weights))
        np.testing.assert_array_equal(state["enc.32x32_conv.bias"].numpy(), net.params[bias])
    with pytest.raises(UserError, match="has no target_params"):
        READERS["jax"](Source(path, "target"))
    with pytest.raises(UserError, match=r"--weights ema:0\.9999"):
        READERS["jax"](Source(path, "ema:0.9999"))


def test_arrays_in_chunks_and_bfloat16_are_read(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    chunks = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 3, "1": 4},
        "chunks": {"0": array.ravel()[:5], "1": array.ravel()[5:]},
    }
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    content = msgpack.packb(((2,), "bfloat16", half.view(torch.int16).numpy().tobytes()))
    path = tmp_path / "c"
    path.write_bytes(
        msgpack.packb(
            {"a": chunks, "b": msgpack.ExtType(1, content), "c": np.int32(7)}, default=pack, strict_types=True
        )
    )
    tree = jax_cifar.read_flax(str(path))
    np.testing.assert_array_equal(tree["a"], array)
    np.testing.assert_array_equal(tree["b"], [1.5, -2.0])
    assert tree["c"] == 7


def test_other_networks_are_refused_in_one_line(tmp_path):
    flax = Flax()
    flax(np.zeros((1, 32, 32, 3)), np.zeros(1))

    def refuses(message: str, change) -> None:
        arrays = dict(flax.params)
        change(arrays)
        with pytest.raises(UserError, match=message) as caught:
            jax_cifar.convert_params(arrays, "file")
        assert "\n" not in str(caught.value)

    refuses("file has Extra_0/kernel", lambda a: a.update({"Extra_0/kernel": np.zeros((2, 2))}))
    refuses("does not fit", lambda a: a.update({"Conv_1/kernel": np.zeros((3, 3, 16, 4))}))
    refuses("is missing|missing in the file", lambda a: a.pop("Conv_1/bias"))
    refuses("queries, keys and values", lambda a: a.pop("AttnBlockpp_0/NIN_1/W"))
    refuses("residual and", lambda a: [a.pop(n) for n in list(a) if n.startswith("ResnetBlockBigGANpp_3/")])
    refuses("residual and", lambda a: a.clear())


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "c"
    path.write_bytes(msgpack.packb({"step": 1, "params": {}})[:-1])
    with pytest.raises(UserError, match="not a readable flax checkpoint"):
        READERS["jax"](Source(str(path)))
    path.write_bytes(msgpack.packb({"step": 1}))
    with pytest.raises(UserError, match="has no params_ema; it has step"):
        READERS["jax"](Source(str(path)))
    objects = msgpack.ExtType(1, msgpack.packb(((1,), "object", b"\0" * 8)))
    path.write_bytes(msgpack.packb({"params_ema": {"a": objects}}))
    with pytest.raises(UserError, match="not a readable flax checkpoint"):
        READERS["jax"](Source(str(path)))
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match="no checkpoint of a kind known here"):
        detect(str(path))
    with pytest.raises(UserError, match="no such checkpoint"):
        detect(str(tmp_path / "nothing"))


ODD = {
    "text in place of an array": lambda tree: tree["Conv_0"].update(kernel="text"),
    "a list in place of an array": lambda tree: tree["Conv_0"].update(kernel=[[1, 2], [3]]),
    "chunks that do not fit": lambda tree: tree["Conv_0"].update(
        kernel={
            "__msgpack_chunked_array__": True,
            "shape": {"0": 7},
            "chunks": {"0": np.zeros(3, np.float32)},
        }
    ),
    "chunks that are missing": lambda tree: tree["Conv_0"].update(kernel={"__msgpack_chunked_array__": True}),
    "an array of another shape": lambda tree: tree["Conv_0"].update(kernel=np.zeros((), np.float32)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_in_a_tree_are_refused_in_one_line(tmp_path, name):
    flax = Flax()
    flax(np.zeros((1, 32, 32, 3)), np.zeros(1))
    tree = flax.tree()
    ODD[name](tree)
    path = tmp_path / "c"
    path.write_bytes(msgpack.packb({"params_ema": tree}, default=pack, strict_types=True))
    with pytest.raises(UserError, match=str(path)) as caught:
        convert(Source(str(path)), str(tmp_path / "x.pt"), "cm", {"training_mode": "edm"})
    assert "\n" not in str(caught.value)
