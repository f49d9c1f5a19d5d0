"""Model cards and the Hugging Face Hub: what stands beside an export, and what is sent by the Hub's own client."""

import base64
import importlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch

from cm.errors import UserError
from cm.storage.checkpoint import write_checkpoint
from cm.storage.weights import file_sha256, load_weights
from cm.tools.convert import card
from cm.tools.convert.formats import Source, convert
from tests.helpers.models import save_consistency_model
from tests.helpers.run_files import make_run


@pytest.fixture
def run(tmp_path):
    """A run of grey digits with a checkpoint at step 20, and a measurement of its average beside it."""
    save_consistency_model(tmp_path / "m.pt", in_channels=1, class_cond=True, num_classes=3)
    state, meta = load_weights(tmp_path / "m.pt")
    folder = make_run(tmp_path / "runs" / "cd", training_mode="consistency_training", steps=())
    told = {"preset": "digits_cd", "data_dir": "/home/someone/secret/digits|x", "global_batch_size": 64}
    files = {"ema_0.99_000020.pt": state, "model000020.pt": state}
    write_checkpoint(folder, 20, files, {"step": 20}, {"config": {**meta["config"], **told}})
    weights = folder / "checkpoints" / "step_000020" / "ema_0.99_000020.pt"
    for name, kind, fid in (("a", "ema:0.99", 3.25), ("b", "raw", 9.5)):
        samples = {"model_path": str(weights), "weights": kind, "nfe": 1, "config": {"sampler": "onestep"}}
        result = {
            "metrics": {"fid": fid},
            "protocol": {"name": "digits"},
            "features": {},
            "comparable": True,
            "samples": {"path": str(tmp_path / name), "count": 1000, "meta": samples},
        }
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(result))
    return folder


def test_the_card_says_what_is_known(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    line = convert(Source(str(run)), str(out / "student.pt"), "cm", {})
    assert line.endswith(f"-> {out}/student.pt (cm), {out}/README.md")
    text = (out / "README.md").read_text()
    weights = run / "checkpoints" / "step_000020" / "ema_0.99_000020.pt"
    for words in (
        "---\nlicense: unknown\n",
        "# student\n",
        "grey images of 8 x 8 pixels of 3 classes",
        "| preset | digits_cd |",
        "| training images | digits x |",  # neither the folder on this machine nor a cell of its own
        "| trained | 20 steps of 64 images |",
        "| weights | ema:0.99 |",
        f"| its SHA-256 | {file_sha256(weights)} |",
        "| onestep | 1 | 1,000 | digits | fid 3.25 |",
        f"`{file_sha256(out / 'student.pt')}`",
        'cm.load("student.pt")',
    ):
        assert words in text, words
    assert "9.5" not in text, "a measurement of other weights"
    assert "/home/someone" not in text and str(tmp_path) not in text


def test_weights_without_a_run_have_a_card_that_says_less(tmp_path):
    save_consistency_model(tmp_path / "m.pt")
    (tmp_path / "out").mkdir()
    convert(Source(str(tmp_path / "m.pt")), str(tmp_path / "out" / "bare.pt"), "legacy", {})
    text = (tmp_path / "out" / "README.md").read_text()
    assert "None of these weights were found." in text and "| trained |" not in text


def test_a_readme_of_somebody_else_stays(run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    convert(Source(str(run)), str(tmp_path / "s.pt"), "cm", {})
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "s.pt.md").exists()


def test_the_card_of_a_new_export_replaces_that_of_the_last(run, tmp_path):
    (tmp_path / "out").mkdir()
    target = str(tmp_path / "out" / "s.pt")
    convert(Source(str(run)), target, "cm", {})
    (tmp_path / "out" / "README.md").write_text(card._mark("s.pt") + " of last week")
    convert(Source(str(run)), target, "cm", {})
    assert "of last week" not in (tmp_path / "out" / "README.md").read_text()


def test_python_of_the_card_runs(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    convert(Source(str(run)), str(out / "student.pt"), "cm", {})
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    found: dict = {}
    exec(code, found)
    assert found["images"].shape == (4, 1, 8, 8) and torch.isfinite(found["images"]).all()


# ---- the Hub -----------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The addresses of the Hub that an upload of small files asks for; `asked` and `files` are what came."""

    asked: ClassVar[list[str]] = []
    files: ClassVar[dict[str, bytes]] = {}
    private: bool | None = None
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.path)
        if self.refuse:
            return self._answer(
                {"error": "You don't have the rights to create a model under this namespace"}, 403
            )
        if self.path == "/api/repos/create":
            type(self).private = json.loads(body).get(
                "private", json.loads(body).get("visibility") == "private"
            )
            return self._answer({"url": "https://huggingface.co/me/digits", "name": "me/digits"})
        if self.path == "/api/validate-yaml":  # the card's first lines
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            return self._answer({"files": answer})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitUrl": "https://huggingface.co/me/digits/commit/1", "commitOid": "1" * 40}
            )
        return self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self._answer({"id": "me/digits", "sha": "1" * 40, "siblings": [], "private": True})

    def _answer(self, content: dict, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch):
    """The real client, with a Hub on this machine at the other end of its network."""
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="huggingface_hub is not installed: pip install '.[hub]'"
    )
    Hub.asked, Hub.files, Hub.refuse, Hub.private = [], {}, False, None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    importlib.import_module("huggingface_hub").close_session()  # one that was opened before may be offline
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_export_is_pushed_by_the_hubs_own_client(run, hub):
    line = convert(Source(str(run)), "hf://me/digits", "safetensors", {})
    assert line.endswith("-> https://huggingface.co/me/digits/commit/1")
    assert set(hub.files) == {"README.md", "model.safetensors"} and hub.private is True
    text = hub.files["README.md"].decode()
    assert text.startswith("---\n") and "# me/digits" in text and "| preset | digits_cd |" in text


def test_what_the_hub_refuses_is_one_line(run, hub):
    hub.refuse = True
    with pytest.raises(UserError, match=r"hf://me/digits: .*403") as caught:
        convert(Source(str(run)), "hf://me/digits", "safetensors", {})
    assert "\n" not in str(caught.value) and hub.files == {}


def test_names_that_are_no_repository(run):
    for name in ("me", "me/you/them", "", "../x"):
        with pytest.raises(UserError, match="hf://OWNER/NAME"):
            convert(Source(str(run)), f"hf://{name}", "cm", {})
