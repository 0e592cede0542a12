"""Outside loggers: what each tool is given, that a failing one ends nothing, and that a resumed run goes on in the same one."""

import importlib.machinery
import json
import sys
import types

import pytest

from nanotrain import trackers
from nanotrain.__main__ import main
from nanotrain.trackers import LogConfig, check_trackers, close_trackers, open_trackers, send
from tests.stages.test_pretrain import final_state, flags, rows_of, stop_after


def module(monkeypatch, name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="played")
    made.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def wandb(monkeypatch):
    """A played wandb; `runs` holds what each init was given and what its run was told."""

    class Run:
        def __init__(self, given):
            self.given, self.rows, self.axes, self.ends = given, [], [], []
            self.config = types.SimpleNamespace(update=lambda config, allow_val_change: None)

        def define_metric(self, name, step_metric=None):
            self.axes.append((name, step_metric))

        def log(self, row):
            self.rows.append(row)

        def finish(self, exit_code):
            self.ends.append(exit_code)

    runs = []

    def init(**given):
        runs.append(Run(given))
        return runs[-1]

    return module(monkeypatch, "wandb", init=init, runs=runs, Settings=lambda **settings: settings)


@pytest.fixture
def tensorboard(monkeypatch):
    """A played SummaryWriter; `writers` holds them."""
    writers = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars, self.texts, self.closed = folder, purge_step, [], [], 0
            writers.append(self)

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def add_text(self, *text):
            self.texts.append(text)

        def close(self):
            self.closed += 1

    module(monkeypatch, "tensorboard")
    return module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter, writers=writers)


@pytest.fixture
def mlflow(monkeypatch):
    """A played MLflow server; `batches`, `texts`, `ends` and `created` hold what it was sent."""
    there = module(monkeypatch, "mlflow", batches=[], texts=[], ends=[], created=[])
    there.entities = types.SimpleNamespace(Param=lambda *param: param, Metric=lambda *metric: metric)

    class Client:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return f"id of {name}"

        def create_run(self, experiment_id, run_name):
            there.created.append((experiment_id, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run {len(there.created)}"))

        def update_run(self, run_id, status):
            there.ends.append((run_id, status))

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(params) <= 100 and len(metrics) <= 1000
            there.batches.append((run_id, [*metrics], [*params]))

        def log_text(self, run_id, text, file):
            there.texts.append((run_id, text, file))

        def set_terminated(self, run_id, status):
            there.ends.append((run_id, status))

    there.MlflowClient = Client
    return there


@pytest.mark.parametrize("flag", ["--log.wandb=proj", "--log.tensorboard", "--log.mlflow=proj"])
@pytest.mark.parametrize("stage", ["pretrain", "quickstart"])
def test_a_tool_that_is_not_installed_is_one_line_before_anything_begins(tmp_path, monkeypatch, capsys, flag, stage):
    name = flag.removeprefix("--log.").partition("=")[0]
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda asked: None)
    assert main([stage, "--train.steps=1", f"--run.dir={tmp_path}/r", f"--data.dir={tmp_path}/d", flag]) == 2
    value = "true" if name == "tensorboard" else "proj"
    wanted = f"nanotrain {stage}: --log.{name} {value}: the package {name} is not installed; pip install 'nanotrain[{name}]'\n"
    assert capsys.readouterr().err == wanted and not list(tmp_path.iterdir())


def test_a_folder_of_a_tools_name_is_not_the_tool(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    found = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    assert found is not None
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match="wandb is not installed"):
        check_trackers(LogConfig(wandb="p"))


ALL = ("--log.wandb=team/proj", "--log.tensorboard", "--log.mlflow=proj")
RUN = ("--train.steps=6", "--train.sample_every=3", "--train.ratios_every=5")


def test_every_number_and_sample_of_a_run_is_sent_and_a_resumed_one_goes_on(data, tmp_path, monkeypatch, wandb, tensorboard, mlflow):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    monkeypatch.setattr(trackers.MLflow, "EVERY_S", 0.0)
    monkeypatch.setattr("nanotrain.stages.pretrain.Loop.sample", lambda self, prompt: f"{prompt}\nwritten")
    stop_after(4, flags(data, tmp_path / "r", *RUN, *ALL))
    assert main(flags(data, tmp_path / "r", *RUN, *ALL, "--resume=auto")) == 0
    assert main(flags(data, tmp_path / "plain", *RUN)) == 0 and final_state(tmp_path / "plain") == final_state(tmp_path / "r")

    sent = {}  # (step, name) -> value, as metrics.jsonl has them
    for row in rows_of(tmp_path / "r", "step"):
        for name, value in row.items():
            nested = value.items() if isinstance(value, dict) else ()
            sent |= {(row["step"], f"{name}/{key}"): inner for key, inner in nested}
            if name != "step" and isinstance(value, (int, float)):
                sent[row["step"], name] = value
    assert (1, "update_ratio/embed.weight") in sent and (5, "update_ratio/embed.weight") in sent and (6, "val_bpb") in sent

    first, second = wandb.runs
    got = {(row["step"], name): value for run in wandb.runs for row in run.rows for name, value in row.items() if name != "step"}
    texts = {key: got.pop(key) for key in [(3, "sample"), (6, "sample")]}
    assert got == sent and set(texts.values()) == {"def \nwritten"}
    assert (first.given["entity"], first.given["project"], first.given["name"]) == ("team", "proj", "r")
    assert first.given["id"] == second.given["id"] and first.given["resume"] == "allow" and first.ends == second.ends == [0]
    assert ("*", "step") in first.axes and first.given["config"]["train.steps"] == 6 and "secret-key" not in repr(vars(first))

    writers = tensorboard.writers
    assert {(step, name): value for w in writers for name, value, step in w.scalars} == sent
    assert [w.purge_step for w in writers] == [1, 5] and [w.closed for w in writers] == [1, 1]
    assert writers[0].folder == f"{tmp_path}/r/tensorboard" and ("sample", "    def \n    written", 3) in writers[0].texts

    assert {(step, name): value for _, metrics, _ in mlflow.batches for name, value, _, step in metrics} == sent
    assert mlflow.created == [("id of proj", "r")] and {run for run, *_ in mlflow.batches} == {"run 1"}
    assert ("train.steps", "6") in [param for _, _, params in mlflow.batches for param in params]
    assert [text[2] for text in mlflow.texts] == ["sample/step-00000003.txt", "sample/step-00000006.txt"]
    assert mlflow.ends == [("run 1", "FINISHED"), ("run 1", "RUNNING"), ("run 1", "FINISHED")]
    assert json.loads((tmp_path / "r/trackers.json").read_text()) == {"wandb": first.given["id"], "mlflow": "run 1"}


def test_a_tool_that_fails_on_the_way_is_named_once_and_the_run_goes_on(data, tmp_path, capsys, wandb, tensorboard):
    def log(row):
        if row["step"] == 3:
            raise ConnectionError("no\nnetwork")

    init = wandb.init
    wandb.init = lambda **given: (run := init(**given), setattr(run, "log", log))[0]
    assert main(flags(data, tmp_path / "r", "--train.steps=6", *ALL[:2])) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "--log." in line]
    assert said == ["--log.wandb: failed and is off from step 3: ConnectionError: no network"]
    assert wandb.runs[0].ends == [1] and tensorboard.writers[0].scalars[-1][2] == 6 and len(rows_of(tmp_path / "r")) == 6


def test_an_error_closes_them_as_failed(data, tmp_path, monkeypatch, wandb, mlflow):
    def step(*arguments):
        raise ValueError("broken")

    monkeypatch.setattr("nanotrain.stages.pretrain.step", step)
    assert main(flags(data, tmp_path / "r", "--train.steps=6", "--log.wandb=p", "--log.mlflow=p")) == 2
    assert wandb.runs[0].ends == [1] and mlflow.ends == [("run 1", "FAILED")]


def test_one_that_does_not_start_is_one_line_and_the_others_are_closed(tmp_path, wandb, mlflow):
    def refuse(self, *arguments):
        raise PermissionError("401: who\nare you?")

    mlflow.MlflowClient.create_experiment = refuse
    with pytest.raises(ValueError) as caught:
        open_trackers(LogConfig(wandb="p", mlflow="q"), tmp_path, {}, 0)
    assert str(caught.value) == "--log.mlflow q: did not start: PermissionError: 401: who are you?; mend that, or go on without it"
    assert wandb.runs[0].ends == [1]


def test_what_is_no_number_or_text_stays_here(wandb, tmp_path):
    opened = open_trackers(LogConfig(wandb="p"), tmp_path, {}, 0)
    send(opened, {"step": 2, "loss": None, "gpu_throttled": ["power cap"], "update_ratio": {"a": None, "b": 0.1}}, print)
    assert wandb.runs[0].rows == [{"step": 2, "update_ratio/b": 0.1}]
    wandb.runs[0].finish = lambda exit_code: 1 / 0
    said = []
    close_trackers(opened, False, said.append)
    assert said == ["--log.wandb: its last rows may be missing: ZeroDivisionError: division by zero"] and not opened
