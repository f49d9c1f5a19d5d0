"""The command of the learning proof: what it runs is valid, and ends up in the table."""

import json
import shlex
from pathlib import Path

import pytest

from cm.commands.cli import parse_config
from cm.config.rows import OBJECTIVES
from cm.config.scripts import SCRIPTS
from cm.config.validation import require_inputs
from cm.errors import UserError
from evaluations.reports import equal_images
from evaluations.reports.digits_report import TITLES
from evaluations.reports.learning_proof import commands, execute, minutes


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_command_is_valid_and_every_sample_set_has_a_title(ranks):
    trained, drawn = [], []
    for line in commands("runs/proof", ranks):
        words = shlex.split(line)
        script = next((w for w in words if w.startswith("scripts/")), "")
        assert script != "scripts/prepare_data.py" or words[:3] == [script, "digits", "runs/proof/data"]
        if Path(script).stem not in SCRIPTS:
            continue
        config = parse_config(SCRIPTS[Path(script).stem], words[words.index(script) + 1 :])
        require_inputs(config)
        if script == "scripts/image_sample.py":
            assert config.model_path in trained
            drawn.append(Path(config.out_dir).name)
        else:
            assert ("torch.distributed.run" in words) == (ranks == 2)
            assert not getattr(config, "teacher_model_path", "") or config.teacher_model_path in trained
            trained.append(config.out_dir)
    assert len(trained) == 12 and len(set(drawn)) == len(drawn) == 24 and set(drawn) <= TITLES.keys()


def test_a_failing_command_is_named():
    assert execute("-c 'print(6 * 7)'")[0] == "42\n"
    with pytest.raises(UserError, match=r"python -c .* ended with exit code 3"):
        execute("-c 'raise SystemExit(3)'")
    assert minutes(125.4) == "2:05" and minutes(119.7) == "2:00"


def training(compared="family"):
    """name -> configuration of every student of the comparison."""
    found, images = {}, equal_images.COMPARISONS[compared].images
    titles = {f"{m.name}_{way}" for m in equal_images.models(images, compared) for way in m.sets}
    for line in equal_images.commands("runs/equal", images, compared=compared):
        words = shlex.split(line)
        script = Path(words[0]).stem
        if script in SCRIPTS:
            config = parse_config(SCRIPTS[script], words[1:])
            require_inputs(config)
            if script == "cm_train":
                found[Path(config.out_dir).name] = config
            elif script == "image_sample":
                assert Path(config.model_path).name in {*found, equal_images.TEACHER}
                assert Path(config.out_dir).name in titles
    return found


def test_students_are_compared_at_equal_images_on_one_network():
    students = training()
    found = {c.training_mode for c in students.values()}
    assert {"consistency_distillation", "consistency_training", "progdist", "tcm", "sct", "scd"} <= found
    assert found <= set(OBJECTIVES)
    for name, c in students.items():
        both = {"tcm": "tcm1", "tcm1": "tcm"}.get(name)
        steps = c.total_training_steps + (students[both].total_training_steps if both else 0)
        assert steps * c.global_batch_size == 19712, name
        same = (c.time_scale, c.ema_rate, c.num_channels, c.channel_mult, c.global_batch_size)
        assert same == (4, "0.98", 32, "1,1", 64), name
        source = Path(c.teacher_model_path).name
        assert source == {"tcm": "tcm1"}.get(name, equal_images.TEACHER), name
    assert students["pd"].distill_steps_per_iter * 7 == students["pd"].total_training_steps


def test_flow_maps_are_compared_at_equal_images():
    modes = {"flow_maps": {"consistency_training", "flow_map", "meanflow", "improved_meanflow"}}
    modes["distilled_maps"] = {
        "ctm",
        "multistep_distillation",
        "flow_map_distillation",
        "consistency_distillation",
    }
    for compared, rate in (("flow_maps", "0.99"), ("distilled_maps", "0.98")):
        students, images = training(compared), equal_images.COMPARISONS[compared].images
        assert modes[compared] <= {c.training_mode for c in students.values()}
        for name, c in students.items():
            halves = 2 if name.startswith("tcm") else 1
            assert halves * c.total_training_steps * c.global_batch_size == images, name
            assert (c.time_scale, c.ema_rate, c.num_channels, c.channel_mult) == (4, rate, 32, "1,1"), name
            assert bool(c.teacher_model_path) == (compared == "distilled_maps"), name
    rows = {
        m.name: m.sets
        for compared in modes
        for m in equal_images.models(equal_images.DEFAULT_IMAGES, compared)
    }
    assert rows["lsd"].keys() == {"nfe1", "nfe2", "nfe4", "nfe8"} and rows["mcd4"].keys() == {"nfe4"}
    assert all(levels.count(",") + 1 == n for n, levels in equal_images.LEVELS.items())


def test_curves_join_the_models_of_several_segments():
    rows = [
        {"model": "mcd2", "scores": {"nfe2": {"nfe": 2, "fid": 0.25}}},
        {"model": "ctm", "scores": {"nfe1": {"nfe": 1, "fid": 0.5}}},
        {"model": "mcd1", "scores": {"nfe1": {"nfe": 1, "fid": 0.75}}},
    ]
    multistep, ctm = equal_images.curves({"rows": rows}, "distilled_maps")
    assert (multistep.name, multistep.x, multistep.y) == ("multistep CD", (1, 2), (0.75, 0.25))
    assert (ctm.name, ctm.x, ctm.y) == ("CTM", (1,), (0.5,))


def test_a_part_of_the_students_and_the_table_of_what_is_there():
    def models(only):
        lines = [line.split() for line in equal_images.commands("runs/equal", 19712, only)]
        return [Path(words[words.index("--out_dir") + 1]).name for words in lines if "cm_train" in words[0]]

    assert models(["tcm"]) == ["tcm1", "tcm"] and models(["sct", "cd"]) == ["cd", "sct"]
    with pytest.raises(UserError, match=r"--only must be one of .*ect"):
        models(["etc"])
    scores = {"onestep": {"nfe": 1, "accuracy": 0.5, "fid": 1.25}}
    result = {"rows": [{"model": "sct", "starts_from": "teacher", "images": 19712, "scores": scores}]}
    assert equal_images.table(result).splitlines()[2] == "| sCT | teacher | 19,712 | 1: 50.0%, 1.250 |  |"


@pytest.mark.parametrize("compared", equal_images.COMPARISONS)
def test_the_table_of_the_systems_is_that_of_the_stored_numbers(compared):
    root, name = Path(__file__).parents[2], {"family": "equal_images"}.get(compared, compared)
    stored = json.loads((root / f"docs/results/digits_{name}.json").read_text())
    assert equal_images.table(stored, compared) in (root / "docs/systems.md").read_text()
    rows = {row["model"]: row for row in stored["rows"]}
    assert rows.keys() <= {equal_images.TEACHER, *training(compared)}
    assert all(0 <= s["accuracy"] <= 1 <= s["nfe"] for row in rows.values() for s in row["scores"].values())
    images = {row["images"] for name, row in rows.items() if name != equal_images.TEACHER}
    assert images == {equal_images.COMPARISONS[compared].images}
