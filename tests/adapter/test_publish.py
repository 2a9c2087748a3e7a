"""`phinetune push`: huggingface_hub itself, talking to a server that keeps what it is given."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from commands import phinetune as command

import phinetune
from phinetune.adapter import files_to_publish


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
        self.answer({"id": "me/orders", "siblings": [], "sha": "1", "private": self.server.is_private})

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
    server.kept, server.is_private = {}, True
    server.url = f"http://127.0.0.1:{server.server_port}"
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
    for name in files.keys() - {"README.md", "adapter_config.json"}:
        assert files[name] == (run / name).read_bytes()
    pushed, here = json.loads(files["adapter_config.json"]), json.loads((run / "adapter_config.json").read_text())
    assert pushed == {**here, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": None}
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
    shown = fresh("push", run, "me/orders", "--dry-run", env=online(hub))
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
    unreachable = fresh(
        "push",
        run,
        "me/orders",
        env=online(hub, HTTPS_PROXY="http://127.0.0.1:9", HF_ENDPOINT="https://huggingface.co"),
    )
    assert unreachable.returncode == 1
    assert "error: repository me/orders: " in unreachable.stderr
    assert "Traceback" not in unreachable.stderr
    assert "is no name on the Hub" in command("push", run, "orders", "--dry-run").stderr
    assert "neither an adapter nor a merged model" in command("push", tmp_path, "me/orders", "--dry-run").stderr


def test_what_is_to_be_private_does_not_go_where_anybody_reads(run, hub):
    hub.is_private = False  # a repository that was there before
    pushed = fresh("push", run, "me/orders", "--private", env=online(hub))
    assert pushed.returncode == 2
    assert "is there already, and anybody can read it" in pushed.stderr
    assert "files" not in hub.kept


def test_where_a_base_lies_is_nobodys_business(run, tmp_path):
    local = shutil.copytree(run, tmp_path / "run")
    config = json.loads((local / "adapter_config.json").read_text())
    for base, public in ((str(tmp_path / "acme"), "acme"), ("owner/name", "owner/name")):
        (tmp_path / "acme").mkdir(exist_ok=True)
        given = {**config, "base_model_name_or_path": base, "revision": None}
        (local / "adapter_config.json").write_text(json.dumps(given))
        pushed = json.loads(files_to_publish(local)["adapter_config.json"])
        assert pushed == {**given, "base_model_name_or_path": public}
        assert str(tmp_path) not in json.dumps(pushed)
        card = phinetune.model_card(local, "me/orders")
        assert ("base_model: owner/name\n" in card) == (base == public)
        assert str(tmp_path) not in card


def test_an_adapter_is_no_merged_model(run, tmp_path):
    assert "is not a merged model" in command("push", run, "me/orders", "--merged", run, "--dry-run").stderr


def test_a_pattern_in_the_cards_table(run, tmp_path):
    tuned = shutil.copytree(run, tmp_path / "run")
    about = json.loads((tuned / "run.json").read_text())
    for setting in about["settings"]:
        if setting["path"] == "peft_config.target_modules":
            setting["value"], setting["origin"] = ".*(q|v)_proj", "recipe"
    (tuned / "run.json").write_text(json.dumps(about))
    assert r"| `peft_config.target_modules` | `.*(q\|v)_proj` |" in phinetune.model_card(tuned, "orders")
