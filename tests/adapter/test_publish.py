"""`phinetune push`: huggingface_hub itself, talking to a server that keeps what it is given."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from commands import phinetune as command

import phinetune


class Hub(BaseHTTPRequestHandler):
    """What of the Hub's interface a push needs: a repository is made, files come in one commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kept = self.server.kept
        kept.setdefault("tokens", set()).add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            kept["made"] = json.loads(body)
            self.answer({"url": f"{self.server.url}/me/orders"})
        elif self.path == "/api/validate-yaml":
            kept["validated"] = json.loads(body)["content"]
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    kept.setdefault("files", {})[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/me/orders/commit/1", "commitOid": "1", "success": True})
        else:
            self.send_error(404)

    def do_GET(self):
        self.answer({"id": "me/orders", "siblings": [], "sha": "1"})

    def answer(self, found):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.kept, server.url = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "orders"
    phinetune.finetune(
        model="smollm2",
        train="phinetune:orders/train",
        eval=0.05,
        training_config={"output_dir": str(folder), "max_steps": 2, "use_cpu": True, "save_strategy": "steps"},
        peft_config={"r": 2, "target_modules": ["q_proj"]},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 2},
        rehearsal=False,
    )
    return folder


def online(hub, **more):
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_ours", **more}


def fresh(*arguments, env):
    """huggingface_hub reads its variables when it is imported, so not in a fork of what has imported it."""
    asked = [sys.executable, "-m", "phinetune", *map(str, arguments)]
    return subprocess.run(asked, capture_output=True, text=True, check=False, env={**os.environ, **env})


def test_what_makes_the_adapter_arrives_with_its_card(run, hub):
    pushed = fresh("push", run, "me/orders", "--private", env=online(hub))
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/me/orders" in pushed.stdout
    made = hub.kept["made"]
    assert (made["name"], made["organization"], made["visibility"]) == ("orders", "me", "private")
    assert hub.kept["tokens"] == {"Bearer hf_ours"}
    files = hub.kept["files"]
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_format.json", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in files.keys() - {"README.md"}:
        assert files[name] == (run / name).read_bytes()
    assert not (run / "README.md").exists(), "the folder stays as it was"
    assert hub.kept["validated"] == files["README.md"].decode()
    _, head, card = files["README.md"].decode().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (about["library_name"], "lora" in about["tags"]) == ("peft", True)
    summary = json.loads((run / "summary.json").read_text())
    assert f"| eval_loss | {summary['base']['eval_loss']:.4g} | {summary['tuned']['eval_loss']:.4g} |" in card
    assert "| `peft_config.r` | `2` |" in card
    assert str(run) not in card, "where it lay is nobody's business"


def test_a_dry_run_shows_the_card_and_pushes_nothing(run, hub):
    shown = command("push", run, "me/orders", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "# orders\n" in shown.stdout
    assert (
        f"would push adapter_model.safetensors  {(run / 'adapter_model.safetensors').stat().st_size:,} bytes"
        in shown.stdout
    )
    assert hub.kept == {}


def test_a_merged_model(run, hub, tmp_path):
    merged = tmp_path / "merged"
    assert command("merge", run, "-o", merged, "--dtype", "bfloat16").returncode == 0
    shown = command("push", run, "me/orders", "--merged", merged, "--dry-run").stdout
    assert "library_name: transformers" in shown
    assert "would push model.safetensors" in shown
    assert "adapter_model" not in shown


def test_what_is_missing_is_said(run, hub, tmp_path):
    without = fresh("push", run, "me/orders", env=online(hub, HF_TOKEN="", HF_HOME=str(tmp_path)))
    assert (without.returncode, "without an access token; set HF_TOKEN" in without.stderr) == (2, True)
    offline = fresh("push", run, "me/orders", env={"HF_TOKEN": "hf_ours", "HF_HUB_OFFLINE": "1"})
    assert (offline.returncode, "the Hugging Face Hub does not answer" in offline.stderr) == (1, True)
    assert "is no name on the Hub" in command("push", run, "orders", "--dry-run").stderr
    assert "neither an adapter nor a merged model" in command("push", tmp_path, "me/orders", "--dry-run").stderr
