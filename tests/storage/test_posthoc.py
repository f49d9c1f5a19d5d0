"""Averages after training: golden numbers, exact cases, files that stay, lengths that are refused."""

import numpy as np
import pytest
import torch

from cm.config import parsing
from cm.errors import UserError
from cm.models.files import load_model_file
from cm.storage import posthoc
from cm.storage.checkpoint import prune_checkpoints, write_checkpoint
from cm.storage.weights import load_weights, save_weights
from cm.tools import posthoc_ema
from cm.training.ema import EmaBank
from cm.training.posthoc_ema import ProfileBank
from tests.helpers.golden_data import later

EXACT = dict(rtol=1e-9, atol=1e-12)


def exponents(lengths) -> np.ndarray:
    """gamma of every length."""
    return np.array([posthoc.exponent(float(length)) for length in lengths])


def test_golden_lengths_and_decays():
    g = later("edm2_net")
    np.testing.assert_allclose(exponents(g["phema/std"]), g["phema/exp"], **EXACT)
    lengths = [posthoc.relative_length(gamma) for gamma in g["phema/exps"]]
    np.testing.assert_allclose(lengths, g["phema/exp_to_std"], **EXACT)
    for key in g.keys("phema/beta_std"):
        gamma = posthoc.exponent(float(key.removeprefix("phema/beta_std")))
        times = g["phema/t_next"]
        step = times[0]  # the first one is the first batch
        found = [posthoc.decay(t, gamma, step) for t in times]
        np.testing.assert_allclose(found, g[key], rtol=1e-6, atol=1e-12)
    # The profile itself: tau^gamma up to the time of the snapshot, scaled to the sum 1
    response = g["phema/response"]
    tau = np.arange(len(response), dtype=np.float64)
    for column, (t, length) in enumerate(zip(g["phema/response_ofs"], g["phema/response_std"], strict=True)):
        wave = np.where(tau <= t, (tau / t) ** posthoc.exponent(length), 0)
        np.testing.assert_allclose(wave / wave.sum(), response[:, column], **EXACT)


def test_golden_fit():
    g = later("edm2_net")
    times, gammas = g["phema/in_ofs"], exponents(g["phema/in_std"])
    own = posthoc.products(times, gammas, times, gammas)
    np.testing.assert_allclose(own, g["phema/correlation"], **EXACT)
    weights, error = posthoc.coefficients(times, gammas, g["phema/out_ofs"], exponents(g["phema/out_std"]))
    np.testing.assert_allclose(weights, g["phema/coefficients"], rtol=1e-8, atol=1e-9)
    stored = list(zip(times, g["phema/in_std"], strict=True))
    for column, wanted in enumerate(zip(g["phema/out_ofs"], g["phema/out_std"], strict=True)):
        assert (error[column] < 1e-6) == (wanted in stored)


def test_golden_track_of_a_run():
    """The bank follows the golden path; snapshots and what is reconstructed from them equal the golden ones."""
    g = later("edm2_net")
    path, lengths, batch = g.tensor("track/path"), g["track/stds"], int(g["track/batch_size"])
    params = [torch.zeros(path.shape[1], dtype=torch.float64)]
    bank = ProfileBank(params, [float(length) for length in lengths])
    saved = []
    for step, point in enumerate(path):
        params[0].copy_(point)
        bank.update(params, step)
        if (step + 1) * batch in g["track/snapshot_nimg"]:
            saved.append(torch.stack([copy[0] for copy in bank.copies]))
    saved = torch.stack(saved)
    torch.testing.assert_close(saved, g.tensor("track/snapshots"), rtol=1e-8, atol=1e-10)
    stored = g["track/reconstruct_coefficients"].shape[0] // len(saved)  # so many profiles were used
    times = np.repeat(g["track/snapshot_nimg"], stored)
    wanted = [0.08, 0.2]
    weights, _ = posthoc.coefficients(
        times, np.tile(exponents(lengths[:stored]), len(saved)), np.full(2, times[-1]), exponents(wanted)
    )
    np.testing.assert_allclose(weights, g["track/reconstruct_coefficients"], rtol=1e-8, atol=1e-9)
    parts = [{"w": row} for row in saved[:, :stored].reshape(-1, path.shape[1])]
    for column, expected in enumerate(g.tensor("track/reconstructed_008_02")):
        found = posthoc.combine(zip(parts, weights[:, column].tolist(), strict=True))["w"]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_an_average_weighs_the_past_by_its_power_function(sigma_rel):
    """After n updates the k-th weights count k^(gamma + 1) - (k - 1)^(gamma + 1) parts of n^(gamma + 1)."""
    n, gamma = 50, posthoc.exponent(sigma_rel)
    params = [torch.zeros(n, dtype=torch.float64)]
    bank = ProfileBank(params, [sigma_rel])
    for step in range(n):
        params[0].copy_(torch.eye(n, dtype=torch.float64)[step])
        bank.update(params, step)
    k = torch.arange(n + 1, dtype=torch.float64) / n
    torch.testing.assert_close(bank.copies[0][0], (k ** (gamma + 1)).diff(), rtol=1e-9, atol=1e-12)
    # Its standard deviation over n is the relative length.
    tau, p = (k[1:] + k[:-1]) / 2, bank.copies[0][0]
    if sigma_rel >= 0.05:
        spread = ((p * tau**2).sum() - (p * tau).sum() ** 2).sqrt().item()
        assert spread == pytest.approx(sigma_rel, rel=0.02)


def write_run(run, steps, lengths=(0.05, 0.1), every=1, keep_last=0, start=0):
    """A run of a linear toy whose weights at step k are k (in the weight) and k^2 (in the bias)."""
    params = list(torch.nn.Linear(2, 1).double().parameters())
    bank = ProfileBank(params, list(lengths), start=start)
    for step in range(start, start + steps):
        with torch.no_grad():
            params[0].fill_(step + 1.0)
            params[1].fill_((step + 1.0) ** 2)
        bank.update(params, step)
        if (step + 1) % every == 0:
            fixed = {"table": torch.tensor([1 / 3]), "count": torch.tensor([step])}
            files = {
                f"{stem}{step + 1:06d}.pt": dict(zip(("weight", "bias"), copy, strict=True)) | fixed
                for stem, copy in zip(bank.stems(), bank.copies, strict=True)
            }
            write_checkpoint(run, step + 1, files, {"step": step + 1}, {"config": {"network": "toy"}})
            prune_checkpoints(run, keep_last, 0)
    return bank


def direct(sigma_rel, steps, value, start=0) -> float:
    """The average that a profile of its own would have given."""
    bank = ProfileBank([torch.zeros(1, dtype=torch.float64)], [sigma_rel], start=start)
    for step in range(start, start + steps):
        bank.update([torch.full((1,), float(value(step + 1)), dtype=torch.float64)], step)
    return bank.copies[0][0].item()


def test_a_linear_toy_is_reconstructed(tmp_path):
    write_run(tmp_path, 64, every=2)
    for sigma_rel in (0.06, 0.08, 0.12):
        state, meta, used = posthoc.reconstruct(tmp_path, sigma_rel)
        assert len(used) == 64 and meta == {"config": {"network": "toy"}}
        assert sum(weight for _, weight in used) == pytest.approx(1)
        assert state["weight"][0, 0].item() == pytest.approx(direct(sigma_rel, 64, lambda k: k), rel=1e-3)
        assert state["bias"].item() == pytest.approx(direct(sigma_rel, 64, lambda k: k**2), rel=1e-3)
        assert torch.equal(state["table"], torch.tensor([1 / 3])), "what never moves is copied"
        assert state["count"].item() == 63
    # A length that was kept is its own snapshot, at any stored step.
    for step in (40, 64):
        state, _, _ = posthoc.reconstruct(tmp_path, 0.1, step)
        kept, _ = load_weights(tmp_path / "checkpoints" / f"step_{step:06d}" / f"posthoc_0.1_{step:06d}.pt")
        torch.testing.assert_close(state["bias"], kept["bias"], rtol=1e-9, atol=0)


def test_what_later_steps_do_does_not_change_an_average(tmp_path):
    write_run(tmp_path / "a", 16)
    write_run(tmp_path / "b", 24)
    first, _, _ = posthoc.reconstruct(tmp_path / "a", 0.08, 16)
    second, _, _ = posthoc.reconstruct(tmp_path / "b", 0.08, 16)
    assert torch.equal(first["bias"], second["bias"])


def test_pruned_checkpoints_leave_their_snapshots(tmp_path):
    write_run(tmp_path / "all", 16)
    write_run(tmp_path / "few", 16, keep_last=2)
    assert len(list((tmp_path / "few" / "checkpoints").iterdir())) == 2
    assert len(list((tmp_path / "few" / "posthoc").iterdir())) == 28
    expected, _, _ = posthoc.reconstruct(tmp_path / "all", 0.08)
    found, _, used = posthoc.reconstruct(tmp_path / "few", 0.08)
    assert len(used) == 32 and torch.equal(found["bias"], expected["bias"])


def test_averages_that_began_anew_use_their_own_snapshots_only(tmp_path):
    write_run(tmp_path, 20)
    write_run(tmp_path, 20, start=20)
    state, _, used = posthoc.reconstruct(tmp_path, 0.08)
    assert {s.start for s, _ in used} == {20} and used[-1][0].path.name == "posthoc_0.1_from_000020_000040.pt"
    assert state["weight"][0, 0].item() == pytest.approx(direct(0.08, 20, lambda k: k, start=20), rel=1e-2)
    _, _, used = posthoc.reconstruct(tmp_path, 0.08, 20)
    assert {s.start for s, _ in used} == {0}


def test_lengths_and_steps_that_the_snapshots_do_not_span(tmp_path):
    def refuses(message, *args):
        with pytest.raises(UserError, match=message) as caught:
            posthoc.plan(tmp_path, *args)
        assert "\n" not in str(caught.value)

    refuses("need a run with --ema_profiles", 0.1)
    with pytest.raises(UserError, match="there is no such run directory"):
        posthoc.plan(tmp_path / "elsewhere", 0.1)
    write_run(tmp_path, 4)
    refuses("the 8 snapshots of lengths 0.05, 0.1 up to step 4 do not span an average of length 0.2 ", 0.2)
    refuses("do not span an average of length 0.01", 0.01)
    refuses("must lie above 0 and not above 0.2886, got 0.3", 0.3)
    refuses("must lie above 0", 0.0)
    refuses("no snapshot of step 5; the nearest are of steps 2, 3, 4", 0.1, 5)
    for text, message in {
        "0.05,0.3": "must lie above 0 and not above 0.2886",
        "0": "must lie above 0",
        "-0.1": "must lie above 0",
        "0.1,0.1": "names a length twice",
        "a": "comma-separated list of numbers",
    }.items():
        with pytest.raises(UserError, match=f"--ema_profiles.*{message}"):
            parsing.parse_ema_profiles(text)
    assert parsing.parse_ema_profiles("") == () and parsing.parse_ema_profiles("0.05,0.1") == (0.05, 0.1)
    with pytest.raises(ValueError, match="relative length"):
        posthoc.exponent(0.29)


@pytest.mark.parametrize("spoilt", [{"w": torch.ones(7)}, {"w": {"a": torch.ones(1)}}, {"w": 3}, {}], ids=str)
def test_a_snapshot_of_another_network_is_named(tmp_path, spoilt):
    write_run(tmp_path, 4)
    path = posthoc.find_snapshots(tmp_path)[-2].path
    save_weights(path, spoilt, {})
    with pytest.raises(UserError, match=rf"{path.name} is no snapshot of the same network"):
        posthoc.reconstruct(tmp_path, 0.08)


def test_weights_by_length(tmp_path):
    write_run(tmp_path / "run", 16)
    file = load_model_file(str(tmp_path / "run"), "posthoc:0.08")
    expected, _, _ = posthoc.reconstruct(tmp_path / "run", 0.08)
    assert torch.equal(file.state["bias"], expected["bias"])
    assert (file.kind, file.config) == ("posthoc:0.08", {"network": "toy"})
    at_12 = load_model_file(str(tmp_path / "run" / "checkpoints" / "step_000012"), "posthoc:0.08")
    assert at_12.state["bias"] < file.state["bias"] and at_12.sha256 != file.sha256
    assert file.sha256 == load_model_file(str(tmp_path / "run"), "posthoc:0.08").sha256
    for text in ("posthoc:", "posthoc:x", "posthoc:0.4", "posthoc:-1"):
        with pytest.raises(UserError, match="--weights posthoc"):
            parsing.parse_weights(text)
    with pytest.raises(UserError, match="--weights must be raw, ema:RATE, posthoc:LENGTH"):
        parsing.parse_weights("post")
    save_weights(tmp_path / "file.pt", file.state)
    with pytest.raises(UserError, match="is one file"):
        load_model_file(str(tmp_path / "file.pt"), "posthoc:0.08")


def test_the_tool_writes_a_model_file(tmp_path, capsys):
    write_run(tmp_path / "run", 16)
    out = tmp_path / "model.pt"
    posthoc_ema.main([str(tmp_path / "run"), "--sigma_rel", "0.08", "--step", "12", "--out", str(out)])
    assert "24 snapshots of steps 1 to 12" in capsys.readouterr().out
    state, meta = load_weights(out)
    assert torch.equal(state["bias"], posthoc.reconstruct(tmp_path / "run", 0.08, 12)[0]["bias"])
    assert meta == {"config": {"network": "toy"}, "ema_sigma_rel": 0.08}
    posthoc_ema.main([str(tmp_path / "run"), "--sigma_rel", "0.08", "--step", "12"])
    beside, _ = load_weights(tmp_path / "run" / "average_0.08_000012.pt")
    assert torch.equal(beside["bias"], state["bias"])
    assert len(posthoc.find_snapshots(tmp_path / "run")) == 32, "it is no snapshot itself"


def test_a_bank_goes_on_bitwise_and_begins_anew():
    torch.manual_seed(0)
    points = torch.randn(20, 3)
    params = [torch.zeros(3)]

    def run(bank, steps):
        for step in steps:
            params[0].copy_(points[step])
            bank.update(params, step)
        return bank

    whole = run(ProfileBank(params, [0.05, 0.1]), range(20))
    half = run(ProfileBank(params, [0.05, 0.1]), range(10))
    again = ProfileBank(params, [0.05, 0.1])
    for number in range(2):
        again.load(number, enumerate(half.whole(number)))
    run(again, range(10, 20))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole.copies, again.copies, strict=True))
    half.restart(params, 10)
    run(half, range(10, 20))
    fresh = run(ProfileBank(params, [0.05, 0.1], start=10), range(10, 20))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(half.copies, fresh.copies, strict=True))
    assert half.stems() == ["posthoc_0.05_from_000010_", "posthoc_0.1_from_000010_"]
    assert EmaBank(params, "0.9", warmup=True).decays(0) == [0.1]
