"""The scripts' runs from data to samples, in one process, and what they say to bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig
from cm.diffusion.noise_levels import LogNormalSampler
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.runtime import logger
from cm.script_util import create_model
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import save_weights
from cm.train_util import TrainLoop

MODEL = [
    "--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1", "--num_heads", "2",
    "--attention_resolutions", "8", "--class_cond", "True",
]  # fmt: skip
TRAIN = [
    "--global_batch_size", "6", "--num_workers", "0", "--log_interval", "1", "--save_interval", "2",
    "--preview_count", "4", "--ema_rate", "0.9,0.99", "--lr", "1e-3", "--total_training_steps", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(data_dir, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("edm"))
    train(EdmTrainConfig, data_dir, out, [])
    return out


def train(cls, data_dir, out, extra):
    run_train(parse(cls, [*MODEL, *TRAIN, "--data_dir", data_dir, "--out_dir", str(out), *extra]))
    return Path(out)


CM = {
    "consistency_distillation": ["--start_ema", "0.9", "--start_scales", "5"],
    "consistency_training": [
        "--target_ema_mode", "adaptive", "--start_ema", "0.9", "--scale_mode", "progressive", "--start_scales", "2",
        "--end_scales", "6",
    ],
    "progdist": ["--scale_mode", "progdist", "--start_scales", "4", "--distill_steps_per_iter", "1"],
    "continuous_distillation": ["--start_scales", "5", "--stop_grad", "False"],
    "continuous_training": ["--start_scales", "5"],
}  # fmt: skip


def cm_flags(mode, teacher, *extra):
    flags = ["--training_mode", mode, "--loss_norm", "l2", "--weight_schedule", "uniform", *CM[mode], *extra]
    return flags if mode == "consistency_training" else [*flags, "--teacher_model_path", teacher]


def test_a_teacher_run_leaves_logs_checkpoints_previews_and_its_configuration(teacher):
    run = Path(teacher)
    assert [p.name for p in complete_checkpoints(run)] == ["step_000002", "step_000003"]
    assert sorted(p.name for p in (run / "previews").iterdir()) == [
        "step_000002_heun18.png",
        "step_000003_heun18.png",
    ]
    rows = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["samples"] == 18
    assert {"loss", "grad_norm", "lr", "images_per_sec"} <= rows[0].keys()
    stored = json.loads((run / "config.json").read_text())
    assert (stored["num_classes"], stored["in_channels"], stored["training_mode"]) == (2, 1, "edm")


@pytest.mark.parametrize("mode", CM)
def test_every_mode_trains_and_its_model_samples_without_model_flags(mode, data_dir, teacher, tmp_path):
    run = train(CmTrainConfig, data_dir, tmp_path / "run", cm_flags(mode, teacher))
    names = {p.name for p in complete_checkpoints(run)[-1].iterdir()}
    assert {"model000003.pt", "ema_0.9_000003.pt", "ema_0.99_000003.pt", "opt000003.pt"} <= names
    assert ("target_model000003.pt" in names) == (
        mode in ("consistency_distillation", "consistency_training")
    )
    assert ("teacher_model000003.pt" in names) == (mode == "progdist")
    sample = ["--model_path", str(run), "--num_samples", "3", "--out_dir", str(tmp_path / "s")]
    run_image_sample(parse(SampleConfig, sample))
    meta = json.loads(next((tmp_path / "s").glob("*.json")).read_text())
    assert meta["nfe"] == 1 and meta["weights"] == "ema:0.99"
    with np.load(next((tmp_path / "s").glob("*.npz"))) as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 1) and arrays["arr_1"].shape == (3,)


def draw(model, out, *extra):
    argv = ["--model_path", model, "--num_samples", "7", "--steps", "4", "--out_dir", str(out), *extra]
    run_image_sample(parse(SampleConfig, argv))
    with np.load(next(Path(out).glob("*.npz"))) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


@pytest.mark.parametrize("sampler", [["--sampler", "heun", "--s_churn", "9"], ["--sampler", "ancestral"]])
def test_samples_do_not_depend_on_the_batch_size(sampler, teacher, tmp_path):
    images, labels = draw(teacher, tmp_path / "a", "--batch_size", "7", *sampler)
    again, same = draw(teacher, tmp_path / "b", "--batch_size", "3", *sampler)
    assert np.array_equal(labels, same)
    assert np.abs(images.astype(int) - again).max() <= 1
    other, _ = draw(teacher, tmp_path / "c", "--seed", "1", *sampler)
    assert np.abs(images.astype(int) - other).max() > 10


def test_classes_in_turn_and_multistep_points(data_dir, teacher, tmp_path):
    run = train(
        CmTrainConfig,
        data_dir,
        tmp_path / "run",
        cm_flags("consistency_distillation", teacher, "--init", "teacher"),
    )
    options = ["--sampler", "multistep", "--classes", "1,0,1"]
    two, labels = draw(str(run), tmp_path / "ts", *options, "--ts", "0,2,3")
    assert labels.tolist() == [1, 0, 1, 1, 0, 1, 1]
    completed, _ = draw(str(run), tmp_path / "short", *options, "--ts", "0,2")
    assert np.array_equal(two, completed)
    meta = json.loads(next((tmp_path / "ts").glob("*.json")).read_text())
    assert meta["nfe"] == 2
    sigmas = ",".join(repr(s) for s in meta["sigmas"][:-1])
    by_sigma, _ = draw(str(run), tmp_path / "sigmas", *options, "--sigmas", sigmas)
    assert np.abs(two.astype(int) - by_sigma).max() <= 1


@pytest.mark.parametrize(("weights", "name"), [("raw", "model"), ("ema:0.9", "ema_0.9_"), ("", "ema_0.99_")])
def test_choice_of_weights(weights, name, teacher, tmp_path):
    images, _ = draw(teacher, tmp_path / "run", *(["--weights", weights] if weights else []))
    file = complete_checkpoints(teacher)[-1] / f"{name}000003.pt"
    direct, _ = draw(str(file), tmp_path / "file")
    assert np.array_equal(images, direct)


def test_bare_state_dict_needs_only_what_shapes_cannot_tell(tmp_path):
    torch.manual_seed(0)
    flags = dict(
        num_channels=64, num_res_blocks=1, channel_mult="1,1", attention_resolutions="8", num_head_channels=64
    )
    model = create_model(image_size=8, **flags, resblock_updown=True)
    torch.save(model.state_dict(), tmp_path / "legacy.pt")
    base = [
        "--model_path",
        str(tmp_path / "legacy.pt"),
        "--num_samples",
        "2",
        "--out_dir",
        str(tmp_path / "s"),
    ]
    with pytest.raises(UserError, match="--image_size"):
        run_image_sample(parse(SampleConfig, base))
    with pytest.raises(UserError, match="--training_mode"):
        run_image_sample(parse(SampleConfig, [*base, "--image_size", "8"]))
    config = parse(
        SampleConfig,
        [*base, "--image_size", "8", "--training_mode", "consistency_distillation", "--sampler", "onestep"],
    )
    run_image_sample(config)
    with pytest.raises(UserError, match="already there"):
        run_image_sample(config)


def test_the_scripts_loop_equals_a_loop_built_by_hand(data_dir, teacher, tmp_path):
    """Same data and seeds through TrainLoop and KarrasDenoiser give the weights of the script's run."""
    from cm.data import open_dataset
    from cm.data.stream import TrainStream
    from cm.seeding import derive_seed

    logger.configure(str(tmp_path), [])
    dataset = open_dataset(data_dir, image_size=8, class_cond=True)
    torch.manual_seed(derive_seed(0, "init"))
    model = create_model(
        image_size=8,
        num_channels=32,
        num_res_blocks=1,
        channel_mult="1",
        num_heads=2,
        attention_resolutions="8",
        use_scale_shift_norm=True,
        class_cond=True,
        num_classes=2,
        in_channels=1,
    )
    loop = TrainLoop(
        model=model,
        diffusion=KarrasDenoiser(),
        data=iter(TrainStream(dataset, global_batch_size=6)),
        batch_size=6,
        microbatch=-1,
        lr=1e-3,
        ema_rate="0.9,0.99",
        log_interval=10,
        save_interval=-1,
        resume_checkpoint="",
        schedule_sampler=LogNormalSampler(),
        total_training_steps=3,
    )
    loop.run_loop()
    script = complete_checkpoints(teacher)[-1]
    by_script = torch.load(script / "model000003.pt", weights_only=True)
    for name, value in loop.mp_trainer.weights.state_dict().items():
        assert torch.equal(value, by_script[name]), name


# --- bad input: one line that names the flag or the file ---


def refuses(match, run):
    with pytest.raises(UserError, match=match) as error:
        run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--global_batch_size", "13"], "fewer"),
        (["--image_size", "10", "--channel_mult", "1,1,1", "--attention_resolutions", "10"], "--image_size"),
        (["--schedule_sampler", "gauss"], "--schedule_sampler"),
        (["--lr", "-1"], "--lr"),
        (["--num_res_blocks", "0"], "--num_res_blocks"),
        (["--preset", "digits"], "--preset"),
        (["--use_fp16", "True", "--precision", "bf16"], "--precision"),
        (["--resume", "must"], "--resume must"),
        (["--num_classes", "1"], "2 classes"),
    ],
)
def test_bad_training_flags(extra, match, data_dir, tmp_path):
    out = tmp_path / "out"
    refuses(match, lambda: train(EdmTrainConfig, data_dir, out, extra))
    assert not list(out.glob("**/*.pt"))


@pytest.mark.parametrize(
    ("mode", "extra", "match"),
    [
        ("consistency_distillation", ["--teacher_model_path", ""], "--teacher_model_path"),
        ("progdist", ["--teacher_model_path", ""], "--teacher_model_path"),
        ("progdist", ["--start_scales", "6"], "--start_scales"),
        ("consistency_distillation", ["--loss_norm", "l3"], "--loss_norm"),
        ("consistency_distillation", ["--training_mode", "cd"], "--training_mode"),
        ("consistency_distillation", ["--num_channels", "64"], r"in the file, .* in the model"),
        ("consistency_training", ["--init", "teacher"], "--teacher_model_path"),
        ("consistency_training", ["--start_ema", "0"], "--start_ema"),
    ],
)
def test_bad_distillation_flags(mode, extra, match, data_dir, teacher, tmp_path):
    refuses(match, lambda: train(CmTrainConfig, data_dir, tmp_path, [*cm_flags(mode, teacher), *extra]))


def test_bad_teachers(data_dir, teacher, tmp_path):
    student = train(CmTrainConfig, data_dir, tmp_path / "cd", cm_flags("consistency_distillation", teacher))
    flags = cm_flags("consistency_distillation", str(student))
    refuses("a teacher is a denoiser", lambda: train(CmTrainConfig, data_dir, tmp_path / "a", flags))
    (tmp_path / "t.pt").write_bytes(b"not a model")
    flags = cm_flags("consistency_distillation", str(tmp_path / "t.pt"))
    refuses(r"t\.pt", lambda: train(CmTrainConfig, data_dir, tmp_path / "b", flags))


def test_unlabelled_data(tmp_path):
    images = tmp_path / "flat"
    images.mkdir()
    for i in range(8):
        Image.new("L", (8, 8), i).save(images / f"{i}.png")
    refuses("class_cond", lambda: train(EdmTrainConfig, str(images), tmp_path / "o", []))
    (tmp_path / "empty").mkdir()
    refuses("empty|no images", lambda: train(EdmTrainConfig, str(tmp_path / "empty"), tmp_path / "o", []))


def test_out_dir_that_is_a_file(data_dir, tmp_path):
    (tmp_path / "file").write_text("kept")
    refuses("--out_dir", lambda: train(EdmTrainConfig, data_dir, tmp_path / "file", []))
    assert (tmp_path / "file").read_text() == "kept"


def test_changed_configuration_is_named(data_dir, tmp_path):
    out = train(EdmTrainConfig, data_dir, tmp_path, [])
    refuses("--lr 0.001 -> 0.5", lambda: train(EdmTrainConfig, data_dir, out, ["--lr", "0.5"]))
    train(EdmTrainConfig, data_dir, out, ["--total_training_steps", "4", "--resume_with_changes", "True"])
    assert complete_checkpoints(out)[-1].name == "step_000004"


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--sampler", "rk4"], "--sampler"),
        (["--sampler", "multistep", "--ts", "0,3,2"], "decrease"),
        (["--sampler", "multistep", "--ts", "0,2,9"], "grid|--ts"),
        (["--num_samples", "0"], "--num_samples"),
        (["--classes", "5"], "--classes"),
        (["--weights", "ema:0.5"], "--weights"),
        (["--model_path", "nowhere"], "--model_path"),
        (["--num_channels", "64"], r"in the file, .* in the model"),
    ],
)
def test_bad_sampling_flags(extra, match, teacher, tmp_path):
    argv = [
        "--model_path",
        teacher,
        "--steps",
        "4",
        "--num_samples",
        "2",
        "--out_dir",
        str(tmp_path / "s"),
        *extra,
    ]
    refuses(match, lambda: run_image_sample(parse(SampleConfig, argv)))
    assert not list(tmp_path.glob("**/*.npz"))


def test_model_with_code_is_refused(tmp_path):
    import os

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"a": Malicious()}, tmp_path / "m.pt")
    argv = ["--model_path", str(tmp_path / "m.pt"), "--out_dir", str(tmp_path / "s")]
    refuses(r"m\.pt", lambda: run_image_sample(parse(SampleConfig, argv)))
    assert not (tmp_path / "pwned").exists()


def test_checkpoint_of_another_kind_of_network(tmp_path):
    save_weights(tmp_path / "m.pt", {"weight": torch.zeros(2)})
    argv = [
        "--model_path",
        str(tmp_path / "m.pt"),
        "--out_dir",
        str(tmp_path / "s"),
        "--training_mode",
        "edm",
    ]
    refuses("ADM U-Net", lambda: run_image_sample(parse(SampleConfig, argv)))


def test_augmented_training_tells_the_network(data_dir, tmp_path):
    """NCSN++ gets labels of what was done; the images are mirrored by the augmentation, not by the data set."""
    song = ["--network", "ncsnpp", "--num_channels", "16", "--attention_resolutions", "8", "--augment", "0.5"]
    run = train(EdmTrainConfig, data_dir, tmp_path, [*song, "--total_training_steps", "1"])
    state = torch.load(complete_checkpoints(run)[-1] / "model000001.pt", weights_only=True)
    assert state["map_augment.weight"].shape[1] == 9
    assert json.loads((run / "config.json").read_text())["augment_dim"] == 9
    draw(str(run), tmp_path / "s")
    refuses("--augment", lambda: train(EdmTrainConfig, data_dir, tmp_path / "adm", ["--augment", "0.1"]))
