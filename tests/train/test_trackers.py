"""`report_to`: each logger's own library writes to disk, and what it wrote is read back."""

import json
import struct

import pytest

import phinetune
from phinetune.train import trackers


def train(folder, model, rows, reports, resume=False, steps=4, **more):
    training = {
        "output_dir": str(folder), "max_steps": steps, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "report_to": reports,
        "run_name": "one", "project": "ours", **more,
    }  # fmt: skip
    phinetune.finetune(
        model=str(model), train=str(rows), eval=0.1, training_config=training, peft_config={"r": 2}, resume=resume
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_mlflow_goes_on_in_the_same_run(tmp_path, tiny_llama_folder, chats):
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "run"
    train(folder, tiny_llama_folder, chats, "mlflow")
    losses = train(folder, tiny_llama_folder, chats, "mlflow", resume=str(folder / "checkpoint-2"))
    client = MlflowClient((folder / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert run.info.run_name == "one"
    assert run.info.status == "FINISHED"
    assert run.data.params["peft_config.r"] == "2"
    assert "model_kwargs.token" not in run.data.params
    seen = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert seen == losses
    assert {m.step for m in client.get_metric_history(run.info.run_id, "eval_loss")} == {4}


def logged(data):
    """The records of a LevelDB log, which is what W&B keeps a run in: a header of 7 bytes, then blocks of 32 KB of
    pieces, each with a checksum, a length and whether it is whole, a record's first, middle or last."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline(tmp_path, tiny_llama_folder, chats):
    from wandb.proto import wandb_internal_pb2

    folder = tmp_path / "run"
    losses = train(folder, tiny_llama_folder, chats, "wandb")
    (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    seen = {}
    for data in logged(written.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            assert (record.run.project, record.run.display_name) == ("ours", "one")
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            seen |= {items["_step"]: items["loss"]} if "loss" in items else {}
    assert seen == losses


def test_trackio(tmp_path, tiny_llama_folder, chats):
    from trackio.sqlite_storage import SQLiteStorage

    losses = train(tmp_path / "run", tiny_llama_folder, chats, "trackio")
    (name,) = SQLiteStorage.get_runs("ours")
    assert name.startswith("one-")
    assert {line["step"]: line["loss"] for line in SQLiteStorage.get_logs("ours", name) if "loss" in line} == losses


def test_a_tracker_that_fails_costs_a_warning(tmp_path, tiny_llama_folder, chats, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    losses = train(folder, tiny_llama_folder, chats, ["mlflow", "tensorboard"])
    assert len(losses) == 4
    assert "report_to: mlflow is left out from here on" in (folder / "train.log").read_text()
    assert list((folder / "tensorboard").glob("events.out.*"))


def test_one_that_is_not_installed_is_said_before_anything_is_loaded(tmp_path, tiny_llama_folder, chats, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(phinetune.errors.InputError, match=r"wandb is not installed; pip install 'phinetune\[wandb\]'"):
        train(tmp_path / "run", tiny_llama_folder, chats, "wandb")
    assert not (tmp_path / "run").exists()
