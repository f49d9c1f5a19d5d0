"""Inception-v3: golden features, the TensorFlow 1 resize by hand, and every way a weights file can be wrong."""

import email.message
import hashlib
import io

import numpy as np
import pytest
import torch

from cm.errors import UserError
from cm.storage import downloads
from evaluations import inception_weights
from evaluations.features import ClassifierFeatures, InceptionFeatures, load_features, tensors_sha256
from evaluations.inception_v3 import InceptionV3, exact_float32, resize_bilinear_tf1
from evaluations.inception_weights import PUBLISHED, load_inception, pytorch_fid_names, read_inception_state
from tests.helpers import golden_data
from tests.helpers.inception_files import pytorch_fid_state, rule_network, rule_state, write_openai

CPU = torch.device("cpu")


def golden_images(case: str) -> torch.Tensor:
    g = golden_data.load("evaluation")
    if case == "float40":
        return 127.5 * (g.tensor("inception/float40/images_nchw_pm1") + 1)
    return g.tensor(f"inception/{case}/images_nhwc").permute(0, 3, 1, 2).float()


def test_state_dict_layout():
    layout = golden_data.json("inception_layout")
    state = InceptionV3().state_dict()
    assert [[k, list(v.shape)] for k, v in state.items()] == layout["state_dict"]
    assert sum(v.numel() for v in state.values()) == layout["num_elements"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", ["r32", "r64", "r256", "r299", "float40"])
def test_features_equal_golden(case, channels_last):
    g = golden_data.load("evaluation")
    net = rule_network(channels_last)
    pool, spatial = net(golden_images(case))
    for found, key in ((pool, "pool_3"), (spatial, "spatial")):
        np.testing.assert_allclose(found, g[f"inception/{case}/{key}"], rtol=1e-4, atol=1e-5)
    if case != "float40":
        for with_bias, key in ((False, "softmax_no_bias"), (True, "softmax_with_bias")):
            expected = g[f"inception/{case}/{key}"]
            np.testing.assert_allclose(net.softmax(pool, with_bias), expected, rtol=1e-4, atol=1e-5)


def test_resize_reads_pixel_i_at_i_times_scale():
    row = torch.tensor([0.0, 10.0, 30.0])
    image = row.expand(1, 1, 3, 3)
    resized = resize_bilinear_tf1(image, 6)[0, 0]
    assert resized[0].tolist() == [0, 5, 10, 20, 30, 30]  # the last pixel has no right neighbour
    torch.testing.assert_close(resize_bilinear_tf1(image.mT, 6)[0, 0], resized.mT)
    assert resize_bilinear_tf1(image, 3) is image


def test_tf32_is_off_inside_and_restored_after():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with exact_float32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_wrong_input_shape():
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\)"):
        rule_network()(torch.zeros(2, 1, 8, 8))


def test_nothing_is_trainable():
    assert not any(p.requires_grad for p in InceptionV3().parameters())


# --- weights files -------------------------------------------------------------------------------


def test_pytorch_fid_names_cover_the_layout_once():
    ours = list(pytorch_fid_names().values())
    assert sorted(ours) == sorted(rule_state()) and len(pytorch_fid_state()) == 566


def test_both_layouts_give_the_same_network(tmp_path):
    torch.save(pytorch_fid_state(), tmp_path / "fid.pth")
    write_openai(tmp_path / "openai.pt")
    first, second = (read_inception_state(tmp_path / n) for n in ("fid.pth", "openai.pt"))
    assert list(first) != [] and all(torch.equal(first[k], rule_state()[k]) for k in rule_state())
    net, _ = load_inception(str(tmp_path / "fid.pth"))
    assert tensors_sha256(net.state_dict()) == tensors_sha256({k: second[k] for k in net.state_dict()})


def test_legacy_serialisation_is_read(tmp_path):
    torch.save(dict(rule_state()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_inception_state(tmp_path / "old.pt")["output.bias"], rule_state()["output.bias"])


def bad_file(kind: str, path):
    if kind == "TorchScript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    elif kind == "another layout":
        write_openai(path, {k: v for k, v in rule_state().items() if k != "layers.mixed_7.conv.mean"})
    elif kind == "batch norms have scales":
        state = pytorch_fid_state()
        state["Mixed_6a.branch3x3.bn.weight"] = state["Mixed_6a.branch3x3.bn.weight"] * 2
        torch.save(state, path)
    elif kind == "not a readable file":
        path.write_bytes(b"not weights")
    elif kind == "flat dictionary":
        torch.save([1, 2], path)


@pytest.mark.parametrize(
    "kind",
    ["TorchScript", "another layout", "batch norms have scales", "not a readable file", "flat dictionary"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_files_are_refused_in_one_line(kind, tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    bad_file(kind, path)
    with pytest.raises(UserError, match=kind) as error:
        read_inception_state(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_code_in_a_pickle_never_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"layers.conv.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="plain tensors"):
        read_inception_state(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_offline_and_absent_says_what_where_and_how(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(UserError) as error:
        load_inception()
    known = PUBLISHED["pytorch-fid"]
    for part in (known.name, known.url, str(known.cached), "Inception weights"):
        assert part in str(error.value)
    assert not list((tmp_path / "inception").iterdir())


def test_a_file_in_the_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path))
    (tmp_path / "inception").mkdir()
    path = write_openai(PUBLISHED["openai"].cached)
    assert inception_weights.find_inception()[0] == path


class Answer(io.BytesIO):
    """What a server answers, without any header."""

    def info(self):
        return email.message.Message()


def serve(monkeypatch, content):
    monkeypatch.setattr(torch.hub, "urlopen", lambda *request, **options: Answer(content))


def test_download_once_then_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CM_CACHE_DIR", "~/cache")
    serve(monkeypatch, b"content")
    path = downloads.local_copy("https://host/file.pt", flag="--flag")
    assert path.read_bytes() == b"content" and path.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(torch.hub, "urlopen", None)
    assert downloads.local_copy("https://host/file.pt", flag="--flag") == path
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match="SHA-256"):
        downloads.check_sha256(path)


def test_a_download_with_the_wrong_hash_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "cache"))
    serve(monkeypatch, b"content")
    for name, options in (("weights-0123abcd.pth", {}), ("weights.pt", {"sha256": "0123ABCD"})):
        with pytest.raises(UserError, match=f"--flag: {name}.*0123abcd"):
            downloads.local_copy(f"https://host/{name}", **options, flag="--flag")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_cache_folder_that_is_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").write_bytes(b"")
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "cache"))
    serve(monkeypatch, b"content")
    with pytest.raises(UserError, match=r"cannot write downloads to .*set CM_CACHE_DIR"):
        downloads.local_copy("https://host/file.pt", flag="--flag")


def test_plain_http_needs_a_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "cache"))
    serve(monkeypatch, b"content")
    location = "http://user:secret@host/weights.pt?key=secret"
    with pytest.raises(UserError, match=r"Inception weights: weights\.pt .*--weights_sha256") as error:
        inception_weights.find_inception(location)
    assert "secret" not in str(error.value) and not (tmp_path / "cache").exists()
    known = hashlib.sha256(b"content").hexdigest()
    assert (
        inception_weights.find_inception(location, known)[1]
        == inception_weights.find_inception("https://host/weights.pt")[1]
        == known
    )


def test_a_name_with_a_hash_is_checked(tmp_path):
    path = tmp_path / "weights-0123abcd.pth"
    path.write_bytes(b"content")
    with pytest.raises(UserError, match="SHA-256"):
        downloads.check_sha256(path)


# --- feature networks ----------------------------------------------------------------------------


def test_inception_features_of_uint8_images(tmp_path):
    network = load_features(f"inception={write_openai(tmp_path / 'i.pt')}", "adm", CPU)
    assert isinstance(network, InceptionFeatures)
    images = golden_data.load("evaluation").tensor("inception/r32/images_nhwc")[:1]
    expected = golden_data.load("evaluation")["inception/r32/pool_3"][:1]
    np.testing.assert_allclose(network(images)["pool"], expected, rtol=1e-4, atol=1e-5)
    grey = images[..., :1]
    torch.testing.assert_close(network(grey)["pool"], network(grey.expand(-1, -1, -1, 3))["pool"])


def test_without_the_weights_and_a_network_another_way_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"no route.*needs no download: --features classifier"):
        load_features("", "inception", CPU)


def test_unknown_network_and_missing_file():
    with pytest.raises(UserError, match=r"--features dino: unknown network; choose inception, classifier"):
        load_features("dino=x.pt", "inception", CPU)
    with pytest.raises(UserError, match=r"did you mean classifier=x\.pt"):
        load_features("x.pt", "inception", CPU)
    with pytest.raises(UserError, match="classifier=PATH"):
        load_features("classifier", "inception", CPU)
    with pytest.raises(UserError, match=r"no such weights file"):
        ClassifierFeatures("/nowhere.pt", CPU)
