import csv
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from example_runs import example_run
from fits import checkpoint, fit, history, power_cut, settings
from lab import compose_raw
from wandb_files import logged, nobody_logged_in, of_kind, read_log, read_summary, segments
from wandb_server import wandb_server

import neo.training.run
from neo.config import ConfigError, resolve
from neo.results.dashboard import BEST
from neo.train import train
from neo.training.consistency import check_config
from neo.training.loggers import MLflow, TensorBoard, Wandb, finish, none
from neo.training.run_labels import RunLabels
from neo.training.wandb_run import summary

CHOICES = {"method": "neo", "lora": "dora", "loss": "forward_kl", "data": "jsonl", "logger": "x"}
OPTIONS = (
    "data.val_share=0.3", "data.packing=false", "data.batch_size=2", "trainer.max_epochs=-1",
    "trainer.max_steps=4", "trainer.val_check_interval=2", "checkpoint_every_n_steps=2",
)  # fmt: skip
WANDB = ("logger=wandb", "logger.tags=[mine]", "experiment_name=ranks/small", *OPTIONS)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder in which nobody is logged in, and in which all runs take place."""
    folder = tmp_path_factory.mktemp("sandbox")
    with pytest.MonkeyPatch.context() as patch:
        nobody_logged_in(folder / "home", patch)
        patch.chdir(folder)
        patch.setattr(neo.training.run, "hydra_choices", lambda: (CHOICES, []))
        yield folder


@pytest.fixture
def labels(tmp_path):
    def build(experiment="ranks", folder=tmp_path, **others):
        config = {"experiment_name": experiment, "method": {"name": "neo"}, "seed": 3}
        return RunLabels(
            **{"config": config, "run_id": "8ea2e51d", "choices": CHOICES, "folder": folder}
            | others
        )

    return build


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_no_logger_is_none():
    assert none() is None


def test_a_run_is_called_by_what_is_compared(labels):
    found = labels()
    assert (found.name, found.experiment) == ("neo dora seed 3 8ea2e51d", "ranks")
    assert found.tags == ["lora=dora", "loss=forward_kl", "data=jsonl"]
    assert labels(choices={"lora": "none"}).name == "neo seed 3 8ea2e51d"
    assert labels(choices={}).tags == []
    assert found.flat()["method.name"] == "neo"
    assert found.flat()["choices.lora"] == "dora"


def test_an_id_is_one_of_its_experiment_and_stays_when_a_run_goes_on(labels):
    names = ["ranks", "ranks/small", "ranks-small", "x" * 70, "x" * 71, "a+b", "größe"]
    ids = [labels(name).id for name in names]
    assert ids[0] == "ranks-8ea2e51d"
    assert len(set(ids)) == len(names)
    assert all(len(id) <= 64 and not set(id) & set(":;,#?/'+ö") for id in ids)
    assert labels("ranks", resume_step=2, kept_id="8ea2e51d").id == "8ea2e51d"


@pytest.mark.parametrize("logged_in", [False, True])
def test_a_run_is_offline_if_and_only_if_nobody_is_logged_in(
    logged_in, labels, sandbox, monkeypatch, capsys
):
    import wandb as library

    monkeypatch.setattr(library, "login", lambda prompt, verify: logged_in)
    begun = {}
    monkeypatch.setattr(
        "neo.training.wandb_run.WandbRun.log_hyperparams",
        lambda self, params: begun.update(self._wandb_init),
    )
    Wandb(project="p").build(labels())
    said = capsys.readouterr().err
    assert begun["mode"] == (None if logged_in else "offline")
    assert ("wandb sync" in said) is not logged_in
    if not logged_in:
        assert f"wandb sync {labels().folder}/wandb/offline-run-*" in said
    assert begun["group"] == "ranks"
    assert begun["resume"] is None
    Wandb(project="p").build(labels(resume_step=2))
    assert begun["resume"] == "allow"


def test_what_the_user_says_of_being_online_counts(labels, sandbox, monkeypatch, capsys):
    begun = {}
    monkeypatch.setattr(
        "neo.training.wandb_run.WandbRun.log_hyperparams",
        lambda self, params: begun.update(self._wandb_init),
    )
    Wandb(project="p", offline=True).build(labels())
    assert begun["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    Wandb(project="p").build(labels())
    assert capsys.readouterr().err == ""


REFUSED = [
    ("logger=wandb", "logger.project=a/b", "logger.project='a/b'"),
    ("logger=wandb", "logger.tags=['']", "logger.tags: ''"),
    ("logger=wandb", "logger.group=mine", "logger.group: not a key"),
    ("logger=mlflow", "logger.tracking_uri=mlruns", "sqlite:///FILE.db"),
]


@pytest.mark.parametrize(("choice", "key", "said"), REFUSED)
def test_a_logger_that_cannot_begin_is_refused_before_the_run(choice, key, said):
    config = resolve(compose_raw(choice, key))
    with pytest.raises(ConfigError) as refused:
        check_config(config)
    assert [said in problem for problem in refused.value.problems] == [True]
    if "not a key" not in said:
        check_config(config, here=False)  # the plan of a run elsewhere asks for no logger


@pytest.mark.parametrize("choice", ["tensorboard", "mlflow"])
def test_a_missing_package_is_named_before_the_run(choice, monkeypatch):
    config = resolve(compose_raw(f"logger={choice}"))
    check_config(config)
    monkeypatch.setattr("neo.training.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"logger={choice}: needs \w+.*llm-neo\[loggers\]"):
        check_config(config)


def test_a_logger_that_cannot_end_is_said_and_spoils_nothing(labels, monkeypatch, capsys):
    logger = TensorBoard().build(labels())

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(logger, "finish", full)
    finish([logger], example_run(), labels().folder)
    assert "TensorBoardRun: run" in (said := capsys.readouterr().err)
    assert "no space left" in said


def test_the_best_of_a_validation_is_that_of_the_whole_run(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("step,val/kd,val/agreement,train/kd\n1,0.5,0.9,1\n2,nan,,0\n3,0.75,0.7,2\n")
    metrics = {"val/kd": 0.75, "val/agreement": 0.7, "val/ce": 2.0, "train/kd": 2.0}
    found = summary(example_run(metrics=metrics, num_tokens=7), log)
    assert found["val/kd"] == {"min": 0.5, "last": 0.75}
    assert found["val/agreement"] == {"max": 0.9, "last": 0.7}
    assert found["val/ce"] == {"min": 2.0, "last": 2.0}
    assert (found["train/kd"], found["num_tokens"], found["error"]) == (2.0, 7, "")
    assert "seconds" not in found  # which is not known


ENDS = [("ok", 0), ("failed", 1), ("oom", 1), ("diverged", 1), ("interrupted", 1)]


@pytest.mark.parametrize(("status", "exit_code"), ENDS)
def test_a_run_ends_in_wandb_as_it_ended_here(status, exit_code, labels, monkeypatch):
    run = Mock()
    monkeypatch.setattr("neo.training.wandb_run.WandbRun.experiment", run)
    logger = Wandb(project="p", offline=True).build(labels())
    finish([logger], example_run(status=status), labels().folder)
    run.finish.assert_called_once_with(exit_code=exit_code)
    assert run.mark_preempting.called is (status == "interrupted")
    assert run.summary.update.call_args.args[0]["status"] == status


# -- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wandb_run(sandbox, student_dir, teacher_dir):
    """A run that kept its adapter, its folder, and what W&B's reader finds in its file."""
    record = fit(student_dir, teacher_dir, sandbox / "run", *WANDB, "logger.log_adapter=true")
    (segment,) = segments(sandbox / "run")
    return record, sandbox / "run", read_log(segment), read_summary(segment)


def test_wandb_knows_a_run_by_its_labels_and_its_config(wandb_run):
    record, _, log, found = wandb_run
    (run,) = of_kind(log, "run")
    assert run["project"] == "llm-neo"
    assert run["run_group"] == record.experiment_name == "ranks/small"
    assert run["job_type"] == "neo"
    assert run["display_name"] == f"neo dora seed 0 {record.run_id}"
    assert run["tags"] == ["lora=dora", "loss=forward_kl", "data=jsonl", "mine"]
    assert run["run_id"].endswith(record.run_id)
    assert "resume" not in run
    assert found["config"] == record.config | {"choices": CHOICES}


def test_wandb_logs_what_metrics_csv_says(wandb_run):
    _, folder, log, _ = wandb_run
    for name in ("train/loss", "train/kd", "train/lr", "val/kd", "val/agreement"):
        expected = {int(row["step"]): row[name] for row in rows(folder) if name in row}
        assert len(expected) >= 2
        assert logged(log, name) == pytest.approx(expected, rel=1e-6)


def test_wandb_sums_up_what_the_record_says(wandb_run):
    record, folder, log, found = wandb_run
    kept = found["summary"]
    for name, value in record.metrics.items():
        if name not in BEST:
            assert kept[name] == pytest.approx(value)
            continue
        best = {"min": min, "max": max}[BEST[name]](history(folder, name))
        assert kept[name] == {
            BEST[name]: pytest.approx(best, rel=1e-6), "last": pytest.approx(value),
        }  # fmt: skip
    for name in ("num_trainable_parameters", "num_tokens", "seconds", "peak_memory_gib"):
        assert kept[name] == getattr(record, name)
    assert (kept["status"], kept["run_id"]) == ("ok", record.run_id)
    assert (found["exit_code"], found["state"]) == (0, "finished")
    defined = {metric.get("name"): metric for metric in of_kind(log, "metric")}
    assert defined["val/kd"]["summary"] == {"min": True, "last": True}
    assert defined["val/agreement"]["summary"] == {"max": True, "last": True}
    assert defined["val/kd"]["step_metric"] == "trainer/global_step"
    assert defined["trainer/global_step"]["options"]["hidden"]


def test_wandb_keeps_the_adapter_with_what_it_is_for(wandb_run):
    record, folder, log, _ = wandb_run
    (artifact,) = of_kind(log, "artifact")
    assert (artifact["name"], artifact["type"]) == (f"dora-{record.run_id}", "model")
    kept = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert kept == {f"adapter/{path.name}" for path in (folder / "adapter").iterdir()}
    about = json.loads(artifact["metadata"])
    assert about["metrics"] == record.metrics
    assert about["base_model"] == record.models["student"]


def test_wandb_has_answers_too(sandbox, student_dir):
    record = train(compose_raw(
        "method=lora", "logger=wandb", "trainer=cpu", "trainer.max_steps=1", "data.num_rows=16",
        "data.num_val_rows=8", "eval_split=val", f"student.path={student_dir}",
        "trainer.enable_progress_bar=false", f"run_dir={sandbox / 'answers'}",
    ))  # fmt: skip
    assert record is not None
    (segment,) = segments(sandbox / "answers")
    answers = {k: v for k, v in record.metrics.items() if k.startswith("eval/")}
    assert "eval/mini/exact_match" in answers
    found, log = read_summary(segment)["summary"], read_log(segment)
    assert {k: v for k, v in found.items() if k.startswith("eval/")} == answers
    assert list(logged(log, "eval/mini/exact_match")) == [max(logged(log, "val/ce"))]
    assert of_kind(log, "artifact") == []  # nobody asked for it


@pytest.fixture(scope="module")
def cut_run(sandbox, student_dir, teacher_dir):
    """The same run, cut off in its fourth step and gone on: its record, folder and two files."""
    folder = sandbox / "cut"
    with power_cut(3):
        fit(student_dir, teacher_dir, folder, *WANDB)
    (failed,) = segments(folder)
    record = fit(student_dir, teacher_dir, folder, *WANDB)
    first, second = segments(folder)
    assert first == failed
    return record, folder, first, second


def test_a_run_that_failed_has_failed_in_wandb(cut_run):
    found = read_summary(cut_run[2])
    assert (found["exit_code"], found["state"]) == (1, "failed")
    assert found["summary"]["status"] == "failed"
    assert "the power went out" in found["summary"]["error"]


def test_a_run_that_was_cut_off_goes_on_as_the_same_run_of_wandb(wandb_run, cut_run):
    whole, _, log, found = wandb_run
    record, _, first, second = cut_run
    assert record.run_id == whole.run_id
    logs = [read_log(first), read_log(second)]
    runs = [of_kind(entries, "run")[0] for entries in logs]
    assert runs[0]["run_id"] == runs[1]["run_id"]
    # By this `wandb sync` knows that the second part is added to the first.
    assert [run.get("resume", False) for run in runs] == [False, True]
    for name in ("train/loss", "val/kd"):
        assert logged(logs[0], name) | logged(logs[1], name) == logged(log, name)
        assert min(logged(logs[1], name)) > 0
    kept = read_summary(second)["summary"]
    assert kept["val/kd"] == found["summary"]["val/kd"]
    assert (kept["status"], kept["error"]) == ("ok", "")


def test_a_run_keeps_its_id_when_its_experiment_is_called_something_else(sandbox, student_dir):
    options = ("method=lora", "logger=wandb", *OPTIONS)
    with power_cut(3):
        fit(student_dir, None, sandbox / "named", *options, "experiment_name=before")
    record = fit(student_dir, None, sandbox / "named", *options, "experiment_name=after")
    assert record.experiment_name == "after"
    assert checkpoint(sandbox / "named")["neo"]["wandb_id"] == f"before-{record.run_id}"


def sync(folder, server):
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder / "wandb")],
        check=True, env=os.environ | server.environment,
    )  # fmt: skip


@pytest.mark.slow
def test_the_parts_of_a_run_are_one_run_where_they_are_synced_to(wandb_run, cut_run):
    record, folder, *_ = cut_run
    with wandb_server() as server:
        sync(folder, server)
        ((run_id, run),) = server.runs.items()
    assert run_id.endswith(record.run_id)
    assert run["called"] == {
        "displayName": f"neo dora seed 0 {record.run_id}", "groupName": "ranks/small",
        "jobType": "neo", "tags": ["lora=dora", "loss=forward_kl", "data=jsonl", "mine"],
    }  # fmt: skip
    assert run["config"]["choices"]["value"] == CHOICES
    assert [row["_step"] for row in run["history"]] == list(range(len(run["history"])))
    curve = {row["trainer/global_step"]: row["val/kd"] for row in run["history"] if "val/kd" in row}
    assert curve == logged(wandb_run[2], "val/kd")
    assert run["summary"]["val/kd"] == wandb_run[3]["summary"]["val/kd"]
    assert (run["summary"]["status"], run["exit_code"]) == ("ok", 0)


@pytest.mark.slow
def test_a_run_that_is_synced_later_looks_as_one_that_was_online(sandbox, student_dir, teacher_dir):
    arrived = []
    for mode in ("offline", "online"):
        folder = sandbox / mode
        with wandb_server() as server:
            subprocess.run(
                [sys.executable, "-m", "neo.train", "logger=wandb", "lora=rslora",
                 *settings(student_dir, teacher_dir, folder, *OPTIONS, "trainer=ddp",
                           "trainer.devices=2", "trainer.accelerator=cpu")],
                check=True, env=os.environ | server.environment | {"WANDB_MODE": mode},
            )  # fmt: skip
            if mode == "offline":
                assert (len(segments(folder)), server.runs) == (1, {})  # one of the processes
                sync(folder, server)
            ((_, run),) = server.runs.items()
        run["config"].pop("_wandb")  # of the machine, and of how it was sent
        run["config"].pop("run_dir")
        run["summary"] = {
            key: value for key, value in run["summary"].items()
            if not key.startswith(("_", "perf/", "seconds", "peak_memory"))
        }  # fmt: skip
        run["history"] = [
            {key: value for key, value in row.items() if not key.startswith(("_", "perf/"))}
            for row in run["history"]
        ]
        arrived.append(run)
    assert arrived[0] == arrived[1]
    assert arrived[0]["config"]["choices"]["value"]["lora"] == "rslora"
    assert arrived[0]["called"]["tags"] == ["lora=rslora", "loss=forward_kl", "data=jsonl"]
    assert len(arrived[0]["history"]) > 4


def test_two_runs_of_one_process_are_two_runs_of_wandb(sandbox, wandb_run, capfd):
    assert not (sandbox / "wandb").exists()
    names = [path.name for run in ("run", "answers") for path in segments(sandbox / run)]
    assert len({name.rsplit("-", 1)[1] for name in names}) == len(names)


@pytest.mark.slow
def test_an_offline_run_is_written_below_the_run_and_asks_no_network(labels, sandbox, monkeypatch):
    import socket

    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"
        assert host in ("localhost", "127.0.0.1", "::1"), f"asked {host}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    logger = Wandb(project="p").build(labels(folder=sandbox / "quiet"))
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.experiment.finish()
    (folder,) = segments(sandbox / "quiet")
    assert folder.name.endswith("-8ea2e51d")
    assert list(folder.glob("*.wandb"))


def test_tensorboard_has_the_numbers_of_a_run_that_was_cut_off(sandbox, student_dir, teacher_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder, options = sandbox / "board", ("logger=tensorboard", *OPTIONS)
    with power_cut(3):
        fit(student_dir, teacher_dir, folder, *options)
    record = fit(student_dir, teacher_dir, folder, *options)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "val/kd"):
        found = {event.step: event.value for event in events.Scalars(name)}
        expected = {int(row["step"]): row[name] for row in rows(folder) if name in row}
        assert found == pytest.approx(expected, rel=1e-6)
        assert len(events.Scalars(name)) == len(expected)
    for name, value in record.metrics.items():
        assert events.Scalars(f"final/{name}")[-1].value == pytest.approx(value, rel=1e-6)
    data = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    parameters = data.session_start_info.hparams
    assert parameters["lora.r"].number_value == 4
    assert parameters["choices.lora"].string_value == "dora"
    assert parameters["seed"].number_value == 0
    assert events.Tensors("status/text_summary")[-1].tensor_proto.string_val == [b"ok"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_has_the_numbers_of_a_run_that_was_cut_off(sandbox, student_dir, teacher_dir):
    from mlflow.tracking import MlflowClient

    address = f"sqlite:///{sandbox}/numbers/mlflow.db"
    folder = sandbox / "flow"
    options = ("logger=mlflow", f"logger.tracking_uri={address}", *OPTIONS)
    with power_cut(3):
        fit(student_dir, teacher_dir, folder, *options)
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("default").experiment_id
    (cut,) = client.search_runs([experiment])
    assert cut.info.status == "FAILED"
    assert "the power went out" in cut.data.tags["error"]
    record = fit(student_dir, teacher_dir, folder, *options, "trainer.devices=1")
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"neo dora seed 0 {record.run_id}")
    assert run.data.params["lora.r"] == "4"
    assert (run.data.tags["lora"], run.data.tags["status"]) == ("dora", "ok")
    for name in ("train/loss", "val/kd"):
        found = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
        expected = {int(row["step"]): row[name] for row in rows(folder) if name in row}
        assert found == pytest.approx(expected, rel=1e-6)
    for name, value in record.metrics.items():
        assert run.data.metrics[name] == pytest.approx(value)
    assert run.data.metrics["num_tokens"] == record.num_tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_takes_every_name_that_a_metric_may_have(sandbox, labels):
    address = f"sqlite:///{sandbox}/numbers/mlflow.db"
    logger = MLflow(tracking_uri=address).build(labels("names"))
    logger.log_metrics({"eval/a+b/pass@1": 0.5, "epoch": 1}, step=2)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics == {"eval/a_b/pass_1": 0.5}
    logger.finalize("success")
