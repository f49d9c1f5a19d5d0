"""--channels_last auto: a measurement decides, once for a machine, a network and a kind of pass."""

import json

import pytest
import torch

from cm.config.scripts import ClassifierConfig, SampleConfig, configure
from cm.models import memory_format as formats

CPU = torch.device("cpu")
SMALL = {"image_size": 8, "num_channels": 64, "channel_mult": "1", "num_res_blocks": 1, "in_channels": 3}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Measurements that were asked for; the times they give are in `asked.seconds`."""
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(formats, "_decided", {})

    class Asked(list):
        def __call__(self, config, device, **given):
            self.append({"device": device.type, **given})
            return self.seconds

    calls = Asked()
    calls.seconds = {"channels-last": 1.0, "default": 2.0}
    monkeypatch.setattr(formats, "measure", calls)
    return calls


def chosen(training=True, images=16, device=CPU, **flags):
    return formats.memory_format(
        configure(SampleConfig, **SMALL | flags), device, training=training, images=images
    )


def forget(monkeypatch):
    monkeypatch.setattr(formats, "_decided", {})


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, torch.channels_last), (3.0, torch.preserve_format)])
def test_the_faster_format_is_taken_and_said(seconds, expected, asked, capsys):
    asked.seconds = {"channels-last": seconds, "default": 2.0}
    assert chosen() == expected
    assert asked == [{"device": "cpu", "training": True, "images": 16}]
    text = capsys.readouterr().out
    assert (
        f"channels-last {1e3 * seconds:.0f} ms, default 2000 ms" in text
        and "forward and backward of up to 16" in text
    )


def test_one_measurement_serves_the_machine(asked, monkeypatch, tmp_path):
    assert chosen() == chosen() and len(asked) == 1
    forget(monkeypatch)
    asked.seconds = {"channels-last": 9.0, "default": 2.0}
    assert chosen() == torch.channels_last and len(asked) == 1  # from the file
    assert chosen(training=False) == torch.preserve_format and len(asked) == 2
    assert chosen(channel_mult="1,1") == torch.preserve_format and len(asked) == 3
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert chosen() == torch.preserve_format and len(asked) == 4
    stored = json.loads((tmp_path / "cache" / formats.FILE).read_text())
    assert sorted(stored.values()) == [False, False, False, True]


def test_a_damaged_file_is_measured_over(asked, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / formats.FILE).write_text('{"a": [')
    assert chosen() == torch.channels_last and len(asked) == 1
    assert json.loads((tmp_path / "cache" / formats.FILE).read_text()).keys()


def test_a_folder_that_cannot_be_written_costs_the_memory_only(asked, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert chosen() == torch.channels_last
    assert "is measured anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"channels_last": "True"}, torch.channels_last),
        ({"channels_last": "False"}, torch.preserve_format),
        ({"num_channels": 32}, torch.preserve_format),
        ({"deterministic": True}, torch.channels_last),
        ({"device": torch.device("cuda"), "precision": "bf16"}, torch.channels_last),
        ({"device": torch.device("cuda")}, torch.preserve_format),
    ],
)
def test_nothing_is_measured_where_there_is_no_question(flags, expected, asked):
    assert chosen(**flags) == expected and asked == []


def test_a_gpu_is_asked_unless_it_compiles(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    cuda = {"device": torch.device("cuda"), "images": 64}
    asked.seconds = {"channels-last": 2.0, "default": 1.0}
    assert chosen(**cuda, compile=True, precision="bf16") == torch.channels_last and asked == []
    assert chosen(**cuda, precision="fp32") == torch.preserve_format and asked == []
    assert chosen(device=torch.device("meta")) == torch.channels_last and asked == [], "no values, no time"
    assert chosen(**cuda, precision="bf16") == torch.preserve_format
    assert asked == [{"device": "cuda", "training": True, "images": 32}]
    assert chosen() == torch.preserve_format and asked[1]["device"] == "cpu", "an answer for each device"


@pytest.mark.parametrize(("seconds", "expected"), [(2.5, 16), (0.0, 4)])
def test_a_network_that_is_slow_is_timed_with_few_images(seconds, expected, monkeypatch):
    """Torch's kernels for 16 images are others than for 4, so that as many are timed as the time allows."""
    monkeypatch.setattr(formats, "SECONDS", seconds)
    counts, make = [], formats._pass
    monkeypatch.setattr(formats, "_pass", lambda net, x, *rest: counts.append(len(x)) or make(net, x, *rest))
    formats.measure(configure(SampleConfig, **SMALL), CPU, training=False, images=16)
    assert counts[-1] == expected and counts[0] == 4


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "config", [configure(SampleConfig, **SMALL), configure(ClassifierConfig, **SMALL, num_classes=3)]
)
def test_the_measurement_leaves_no_trace(config, training):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    seconds = formats.measure(config, CPU, training=training, images=2)
    assert seconds.keys() == {"default", "channels-last"} and min(seconds.values()) > 0
    assert torch.equal(torch.get_rng_state(), before)
