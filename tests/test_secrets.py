"""Passwords and signatures in URLs are neither printed nor stored."""

import json

import pytest

from cm.commands.cli import parse
from cm.config.derived import stored_config
from cm.config.scripts import EdmTrainConfig, SampleConfig, resolved
from cm.errors import UserError, masked
from cm.runtime import job, liveness, logger
from cm.storage import downloads, filesystem

URL = "https://user:S3CRET@host.invalid/x.pt?sv=2020&sig=T0KEN%2B&download=1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, "https://***@host.invalid/x.pt?sv=2020&sig=***&download=1"),
        ("https:/user:S3CRET@host/x?sig=T0KEN: no such folder", "https:/***@host/x?sig=*** no such folder"),
        ("https://TOKEN@host/x: refused", "https://***@host/x: refused"),
        (
            "a https://h/x?X-Amz-Signature=a1&X-Amz-Credential=b2 b",
            "a https://h/x?X-Amz-Signature=***&X-Amz-Credential=*** b",
        ),
        ('{"p": "https://h/x?access_token=a1"}', '{"p": "https://h/x?access_token=***"}'),
        ("gs://b/data@v2/x.npz", "gs://b/data@v2/x.npz"),
        ("a@b.c: key=5", "a@b.c: key=5"),
    ],
)
def test_masks(text, shown):
    assert masked(text) == shown


def clean(text: str) -> bool:
    return "S3CRET" not in text and "T0KEN" not in text


def fail() -> None:
    raise UserError(f"{URL} cannot be reached")


def crash() -> None:
    raise ArithmeticError(URL)


@pytest.mark.parametrize("program", [fail, crash])
def test_errors_are_masked(program, capsys):
    with pytest.raises(SystemExit):
        job.run_main(program)
    said = capsys.readouterr().err
    assert "host.invalid" in said and clean(said)


def test_logs_and_stored_flags_are_masked(tmp_path):
    with logger.scoped_configure(str(tmp_path), ["log"]):
        logger.log(f"reading {URL}")
    liveness.write_status(tmp_path, liveness.ERROR, exit_code=2, message=URL)
    assert all(clean(path.read_text()) and "host" in path.read_text() for path in tmp_path.iterdir())
    trained = parse(EdmTrainConfig, ["--data_dir", URL])
    assert clean(json.dumps(stored_config(trained))) and trained.data_dir == URL
    assert clean(json.dumps(resolved(parse(SampleConfig, ["--model_path", URL]))))


def test_copies_are_not_named_by_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        downloads.torch.hub, "download_url_to_file", lambda url, path, *a, **k: open(path, "wb").close()
    )
    assert clean(str(downloads.local_copy(URL, flag="--flag")))
    blob = "https://a.blob.core.windows.net/c/x.npz?sig=T0KEN"
    monkeypatch.setattr(filesystem, "_remote", lambda path, call: type("Stat", (), {"size": 1, "mtime": 1}))
    monkeypatch.setattr(filesystem.os.path, "exists", lambda path: True)
    assert clean(filesystem.cache_locally(blob))
