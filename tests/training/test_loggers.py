"""W&B and MLflow get the numbers of the logs, once; nothing that they do stops or changes a run."""

import importlib.machinery
import json
import os
import shutil
import struct
import sys
import types
from typing import ClassVar

import pytest

from conftest import TINY, final_weights, run
from gtsa import UserError, pretrain
from gtsa.training import loggers
from gtsa.training.loggers import Loggers

LOGS = ("metrics.jsonl", "health.jsonl")


class Fake:
    """A logger that keeps what it is given; ``fail`` names what raises."""

    made: ClassVar[list] = []
    fail = ""

    def __init__(self, folder, run, resumed, config):
        self.run, self.resumed, self.config, self.logged, self.ends = run, resumed, config, [], []
        Fake.made.append(self)
        self._raise("start")

    def _raise(self, what):
        if Fake.fail == what:
            raise ConnectionError("no route\nto host")

    def log(self, step, values):
        self.logged.append((step, values))
        self._raise("log")

    def close(self, finished):
        self.ends.append(finished)
        self._raise("close")


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """The library is there, and is Fake."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Fake)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fail", "")
    return Fake


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_gives_its_numbers_and_a_resumed_one_gives_none_twice(scenes, finished, fake, tmp_path):
    out = tmp_path / "run"
    pretrain(str(scenes), out=out, loggers="wandb", **TINY)
    (logger,) = fake.made
    steps = [line["step"] for line in lines(out, "metrics.jsonl")]
    assert [step for step, values in logger.logged if "loss" in values] == steps
    assert [step for step, values in logger.logged if "health/rank" in values] == [6, 12]
    assert logger.logged[0][1]["loss"] == lines(out, "metrics.jsonl")[0]["loss"]
    assert (logger.resumed, logger.ends, logger.config["seed"]) == (False, [True], 0)
    shutil.rmtree(out / "checkpoints" / "step-00000012")  # as if it had been killed before it was saved
    pretrain(out=out, resume=True)
    assert final_weights(out) == final_weights(finished)
    again = fake.made[1]
    assert (again.run, again.resumed, again.logged) == (logger.run, True, [])
    assert again.ends == [True]


@pytest.mark.parametrize("fail", ["start", "log", "close"])
def test_one_that_fails_is_reported_once_and_changes_nothing(scenes, finished, fake, tmp_path, capsys, fail):
    fake.fail = fail
    out = tmp_path / "run"
    pretrain(str(scenes), out=out, loggers=["wandb"], **TINY)
    message = "--loggers wandb: no route to host; the run continues without it"
    assert capsys.readouterr().out.count(message) == 1
    assert (out / "train.log").read_text().count(message) == 1
    assert final_weights(out) == final_weights(finished)
    timeless = [
        {k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines(out, "metrics.jsonl")
    ]
    assert timeless == [
        {k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines(finished, "metrics.jsonl")
    ]
    assert len(fake.made[0].logged) == (1 if fail == "log" else 0 if fail == "start" else 8)


def test_steps_are_known_by_the_logs_and_by_the_record(fake, tmp_path):
    """Killed twice: the logs were cut to a checkpoint in between, the record was not."""
    notes = []
    first = Loggers(["wandb"], tmp_path, LOGS, {}, notes.append)
    for step in (10, 20, 30):
        first.log("metrics.jsonl", step, {"loss": 1.0, "odd": float("nan")})
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')
    assert fake.made[0].logged == [(step, {"loss": 1.0}) for step in (10, 20, 30)]
    Loggers(["wandb"], tmp_path, LOGS, {}, notes.append)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    third = Loggers(["wandb"], tmp_path, LOGS, {}, notes.append)
    for step in (20, 30, 40):
        third.log("metrics.jsonl", step, {"loss": 1.0})
    third.log("health.jsonl", 20, {"health/rank": 2.0})
    assert [step for step, _ in fake.made[2].logged] == [40, 20]
    assert {logger.run for logger in fake.made} == {first.open["wandb"].run}
    assert notes == []


def test_a_damaged_record_begins_anew(fake, tmp_path):
    (tmp_path / "loggers.json").write_text('{"wandb": 3}')
    Loggers(["wandb"], tmp_path, LOGS, {}, print)
    assert not fake.made[0].resumed
    assert json.loads((tmp_path / "loggers.json").read_text())["wandb"]["run"] == fake.made[0].run


def test_a_missing_library_is_named_before_training(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("pretrain", "--data", scenes, "--out", tmp_path / "run", "--loggers", "mlflow")
    assert code == 2 and "--loggers mlflow needs mlflow; install with: pip install 'gtsa[mlflow]'" in err
    with pytest.raises(UserError, match="pip install 'gtsa\\[wandb\\]'"):
        pretrain(str(scenes), out=tmp_path / "run", loggers="wandb")
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger(scenes, tmp_path):
    with pytest.raises(UserError, match="loggers: 'comet' is unknown, choose from wandb, mlflow"):
        pretrain(str(scenes), out=tmp_path / "run", loggers="comet")
    assert loggers.LOGGERS.keys() == {"wandb", "mlflow"}


# The libraries themselves


def twice(kind, folder):
    """Steps 10 to 30, then a resumed run from step 10 on that gives 20 to 40."""
    for steps in ((10, 20, 30), (20, 30, 40)):
        both = Loggers([kind], folder, LOGS, {"seed": 0, "views": {"a": [1, 2]}}, pytest.fail)
        for step in steps:
            both.log("metrics.jsonl", step, {"loss": 1 / step, "health/rank": 2.0})
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step}) + "\n")
        both.close(finished=True)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_continues_its_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs pip install 'gtsa[mlflow]'")
    from mlflow import MlflowClient

    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    twice("mlflow", tmp_path)
    client = MlflowClient((tmp_path / "mlflow").as_uri())
    (done,) = client.search_runs([client.get_experiment_by_name("gtsa").experiment_id])
    assert [metric.step for metric in client.get_metric_history(done.info.run_id, "loss")] == [10, 20, 30, 40]
    assert (done.info.status, done.data.params["seed"]) == ("FINISHED", "0")


def records(raw, head=7, block=2**15):
    """The records of a .wandb file: LevelDB's log in blocks, after a head of its own."""
    at, parts = head, b""
    while at + 7 <= len(raw):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb")
    pytest.importorskip("wandb", reason="needs pip install 'gtsa[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setitem(loggers.LOGGERS, "wandb", loggers.WeightsAndBiases)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    twice("wandb", tmp_path)
    steps, runs = [], set()
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime):
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps += [int(items["step"])] if "step" in items else []
            runs |= {record.run.run_id} - {""}
    assert steps == [10, 20, 30, 40]
    assert len(runs) == 1
