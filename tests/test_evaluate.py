import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from fits import fit
from lab import tokenizer
from mini_runs import evaluated, lines, mini_run

from neo.data.mini_tasks import KINDS
from neo.evaluation.harness_command import harness_command
from neo.evaluation.settings import Generation, Settings
from neo.export import export
from neo.models.causal_lm import MINI
from neo.report import report
from neo.results.evaluations import without_evaluations
from neo.results.records import RunRecord, read_record

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'llm-neo[eval]'")
METADATA = {"num_test_rows": 40, "rows_seed": 5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and nothing evaluated of it."""
    folder = tmp_path_factory.mktemp("trained") / "runs" / "mini" / "one"
    mini_run(folder, "experiment_name=mini")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may evaluate."""
    return shutil.copytree(trained, tmp_path / "runs" / "mini" / "one")


@pytest.fixture(scope="module")
def mini_lab(trained, tmp_path_factory):
    """A copy of the run with the mini-lab's numbers, base and teacher answering alone."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("all") / "runs" / "mini" / "one")
    before = hashed_models()
    assert evaluated(folder, "tasks=mini_lab") == []
    assert evaluated(folder, "tasks=mini_answer", "models=base,teacher") == []
    assert hashed_models() == before
    return folder


def hashed_models():
    files = sorted(file for file in MINI.rglob("*") if file.is_file())
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def metrics_of(folder):
    return read_record(folder / "record.json").metrics


def by_the_harness(arguments, unit, metadata=METADATA, **options):
    """What the harness itself gives, its own classes and nothing of ours between."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from neo.evaluation.task_names import TASKS

    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=dict(metadata))
    return simple_evaluate(
        model="hf", model_args=arguments, tasks=[unit], task_manager=manager,
        batch_size=64, device="cpu", **options,
    )  # fmt: skip


def likelihoods(rows):
    """Of every choice of every row, as the harness keeps them."""
    return [[response[0][0] for response in row["resps"]] for row in rows]


def test_the_harness_counts_what_training_counted(mini_lab):
    """Two ways from the same rows: neo's own loop of training, and the harness's."""
    metrics = metrics_of(mini_lab)
    for kind in KINDS:
        of_training = metrics[f"eval/mini/exact_match/{kind}"]
        assert metrics[f"eval/mini_answer_{kind}/exact_match"] == pytest.approx(of_training)
    assert 0 < metrics["eval/mini/exact_match"] < 1
    assert metrics["eval/mini_lab/exact_match"] == pytest.approx(metrics["eval/mini/exact_match"])


def test_every_number_is_the_harness_own_to_the_last_digit(mini_lab):
    from neo.evaluation.measuring import numbers_of

    arguments = {"pretrained": str(MINI / "student"), "peft": str(mini_lab / "adapter")}
    results = by_the_harness(arguments, "mini_lab", random_seed=1234)
    expected = numbers_of(results["results"])
    found = metrics_of(mini_lab)
    assert {name: found[name] for name in expected} == expected
    assert {"eval/mini_lab/acc", "eval/mini_lab/acc_stderr"} <= expected.keys()
    assert len(expected) == 48
    for kind in KINDS:
        kept = lines(mini_lab / "evaluation" / "student" / f"mini_choice_{kind}.jsonl")
        ours = [[choice["loglikelihood"] for choice in line["answer"]] for line in kept]
        assert ours == likelihoods(results["samples"][f"mini_choice_{kind}"])


def test_a_run_keeps_its_own_numbers_and_says_how_the_new_ones_were_taken(trained, mini_lab):
    before, after = (read_record(folder / "record.json") for folder in (trained, mini_lab))
    assert before.metrics.items() < after.metrics.items()
    assert without_evaluations(after) == before
    (entry,) = after.evaluations
    assert entry["name"] == "mini_lab"
    assert entry["num_tasks"] == len(entry["tasks"]) == 23
    assert entry["tasks"]["mini_answer_dates"] == {
        "version": 1.0,
        "num_fewshot": 0,
        "num_rows": 4,
    }
    assert entry["settings"]["metadata"] == METADATA
    assert entry["settings"]["seed"] == 1234
    assert entry["batch_size"] == 64
    assert entry["dtype"] == "float32"
    assert {"evaluated_at", "device", "seconds", "cut_prompts"} <= entry.keys()
    assert RunRecord.from_json(after.to_json()) == after


def test_base_and_teacher_have_records_of_their_own_beside_the_run(mini_lab):
    records = {path.name: read_record(path / "record.json") for path in mini_lab.parent.iterdir()}
    records.pop("one")
    roles = {name.partition("-")[0]: record for name, record in records.items()}
    assert set(roles) == {"base", "teacher"}
    for role, record in roles.items():
        assert record.choices == {"method": role}
        assert record.status == "ok"
        assert list(record.config) == ["evaluated"]  # no setting of a run, which rows select by
        assert record.experiment_name == "mini"
        assert "eval/mini_answer/exact_match_stderr" in record.metrics
    assert roles["teacher"].metrics["eval/mini_answer/exact_match"] > 0.9
    assert roles["base"].num_parameters < roles["teacher"].num_parameters
    assert roles["base"].models["student"]["path"] == "neo://mini-student"


def test_a_table_takes_up_students_base_and_teacher(mini_lab, tmp_path):
    folder = tmp_path / "experiments" / "mini"
    folder.mkdir(parents=True)
    (folder / "table.yaml").write_text(
        "title: t\nrows:\n"
        "  - {label: Neo, where: {method: neo}}\n"
        "  - {label: the base, where: {method: base}, reference: true}\n"
        "  - {label: the teacher, where: {method: teacher}, reference: true}\n"
        "columns:\n"
        "  - {metric: eval/mini_answer/exact_match, label: answers}\n"
        "  - {metric: eval/mini_answer/exact_match_stderr, label: their error}\n"
    )
    runs = mini_lab.parent.parent
    table = report("mini", experiments=tmp_path / "experiments", runs=runs)
    assert [len(row.runs) for row in table.rows] == [1, 1, 1]
    text = (folder / "table.md").read_text()
    error = 100 * metrics_of(mini_lab)["eval/mini_answer/exact_match_stderr"]
    assert f"| {error:.1f} |" in text
    assert len(list((folder / "results").glob("*.json"))) == 3


def test_an_evaluation_behind_a_report_is_taken_up_by_the_next_one(trained, mini_lab, tmp_path):
    runs, experiments = tmp_path / "runs", tmp_path / "experiments"
    shutil.copytree(trained, runs / "mini" / "one")
    report("mini", experiments=experiments, runs=runs)
    shutil.copy(mini_lab / "record.json", runs / "mini" / "one")
    table = report("mini", experiments=experiments, runs=runs)
    assert "eval/mini_lab/acc" in table.rows[0].runs[0].metrics
    changed = dataclasses.replace(read_record(mini_lab / "record.json"), seconds=1.0)
    (runs / "mini" / "one" / "record.json").write_text(changed.to_json())
    with pytest.raises(ValueError, match="recorded with other content"):
        report("mini", experiments=experiments, runs=runs)


def test_a_draft_of_a_table_shows_what_was_asked_for_and_bases_as_references(mini_lab, tmp_path):
    report("mini", experiments=tmp_path, runs=mini_lab.parent.parent)
    text = (tmp_path / "mini" / "table.yaml").read_text()
    assert text.count("reference: true") == 2
    assert "metric: eval/mini_lab/acc\n" in text
    assert "mini_choice_dates" not in text
    assert "acc_stderr" not in text


def test_what_is_recorded_with_the_same_settings_is_not_evaluated_again(mini_lab, monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("neo.evaluation.evaluating.load", load)
    before = (mini_lab / "record.json").read_text()
    assert evaluated(mini_lab, "tasks=mini_lab") == []
    assert evaluated(mini_lab, "tasks=mini_answer", "models=base,teacher") == []
    assert (mini_lab / "record.json").read_text() == before
    for other in ("rerun=true", "limit=2"):  # the others: tests/test_evaluation_settings.py
        with pytest.raises(AssertionError, match="was loaded"):
            evaluated(mini_lab, "tasks=mini_lab", other)


@pytest.mark.slow
def test_a_newer_evaluation_of_a_task_takes_the_place_of_the_older(mini_lab, tmp_path):
    folder = shutil.copytree(mini_lab, tmp_path / "one")
    task = "mini_choice_dates"
    evaluated(folder, f"tasks={task}", "limit=2")
    whole, part = read_record(folder / "record.json").evaluations
    assert task not in whole["tasks"]
    assert part["tasks"][task]["num_rows"] == 2
    assert part["settings"]["limit"] == 2
    evaluated(folder, f"tasks={task}", "limit=3")
    _, part = read_record(folder / "record.json").evaluations
    assert part["settings"]["limit"] == 3
    assert len(lines(folder / "evaluation" / "student" / f"{task}.jsonl")) == 3


def test_answers_are_kept_row_by_row(mini_lab):
    folder = mini_lab / "evaluation" / "student"
    answers = lines(folder / "mini_answer_sorting.jsonl")
    assert [line["row"] for line in answers] == [0, 1, 2, 3]
    assert answers[0]["prompt"].endswith("<|im_start|>assistant\n")
    right = [line["answer"].strip() == line["target"] for line in answers]
    assert right == [line["metrics"]["exact_match"] == 1 for line in answers]
    choices = lines(folder / "mini_choice_sorting.jsonl")
    for line in choices:
        likely = max(line["answer"], key=lambda choice: choice["loglikelihood"])
        is_right = line["answer"].index(likely) == line["target"]
        assert is_right == (line["metrics"]["acc"] == 1)
    assert len(lines(mini_lab / "evaluation" / "student" / "mini_choice_logic.jsonl")) == 4


@pytest.mark.slow
def test_the_chat_template_writes_what_the_tasks_write_themselves(mini_lab, tmp_path):
    folder = shutil.copytree(mini_lab, tmp_path / "one")
    evaluated(folder, "tasks=mini_answer_dialogue", "chat=true")
    for name in ("prompt", "answer"):
        one, two = (
            [line[name] for line in lines(f / "evaluation/student/mini_answer_dialogue.jsonl")]
            for f in (mini_lab, folder)
        )
        assert one == two


@pytest.mark.slow
def test_sampled_answers_are_those_of_the_seed_and_of_the_harness(run):
    from neo.evaluation.measuring import numbers_of

    sampling = ["generate.temperature=1.5", "generate.top_p=0.9"]

    def answers(seed):
        evaluated(run, "tasks=mini_answer_strings", *sampling, f"seed={seed}", "rerun=true")
        file = run / "evaluation" / "student" / "mini_answer_strings.jsonl"
        return [line["answer"] for line in lines(file)]

    first, other, again = answers(1), answers(2), answers(1)
    assert first == again != other
    arguments = {"pretrained": str(MINI / "student"), "peft": str(run / "adapter")}
    given = {"temperature": 1.5, "top_p": 0.9, "do_sample": True}
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1
    )
    results = by_the_harness(arguments, "mini_answer_strings", gen_kwargs=given, **seeds)
    expected = numbers_of(results["results"])
    texts = [row["resps"][0][0] for row in results["samples"]["mini_answer_strings"]]
    assert texts == again
    assert expected.items() <= metrics_of(run).items()


@pytest.mark.slow
def test_a_run_of_all_weights_and_an_experiment_folder(tmp_path):
    folder = tmp_path / "runs"
    for name in ("one", "two"):
        mini_run(folder / name, "method=sft", f"seed={len(name)}", "trainer.max_steps=1",
                 "data.num_test_rows=10", "optim.lr=0.001")  # fmt: skip
        assert (folder / name / "model").is_dir()
    assert evaluated(folder, "tasks=mini_choice_units", "models=[student,base]") == []
    names = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert names == {"one", "two", "base"}  # one base for both
    for path in folder.iterdir():
        assert "eval/mini_choice_units/acc" in metrics_of(path)


MALFORMED = """\
task: lost
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: [a, b]
doc_to_target: 0
"""


def test_a_task_whose_rows_cannot_be_had_is_named_and_the_others_are_kept(run, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "lost.yaml").write_text(MALFORMED)
    failed = evaluated(run, "tasks=[lost,mini_choice_dates]", f"include_path={own}")
    assert len(failed) == 1
    assert failed[0].startswith("lost: its rows cannot be loaded: ")
    assert "nowhere.jsonl" in failed[0]
    assert "eval/mini_choice_dates/acc" in metrics_of(run)


@pytest.mark.slow
def test_an_own_task_is_evaluated_and_again_once_its_file_has_changed(run, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "rows.jsonl").write_text('{"q": "Reverse AB."}\n{"q": "Sort BA."}\n')
    text = MALFORMED.replace("nowhere", str(own / "rows")).replace("lost", "kept")
    (own / "kept.yaml").write_text(text)
    evaluated(run, "tasks=kept", f"include_path={own}")
    first = read_record(run / "record.json").evaluations
    evaluated(run, "tasks=kept", f"include_path={own}")
    assert read_record(run / "record.json").evaluations == first
    (own / "kept.yaml").write_text(text.replace("[a, b]", "[A, B]"))
    evaluated(run, "tasks=kept", f"include_path={own}")
    assert read_record(run / "record.json").evaluations != first


@pytest.mark.slow
@pytest.mark.parametrize("given", ["auto", "64"])
def test_a_batch_that_is_too_large_is_made_smaller_where_it_may_be(run, monkeypatch, given):
    from lm_eval.models.huggingface import HFLM

    call = HFLM._model_call

    def full(self, inps, *args, **kwargs):
        if len(inps) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(self, inps, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", full)
    failed = evaluated(run, "tasks=mini_choice_dates", f"batch_size={given}")
    if given == "auto":
        assert failed == []
        assert read_record(run / "record.json").evaluations[0]["batch_size"] == 2
    else:
        assert "batch_size=64 ran out of memory; batch_size=auto finds one" in failed[0]
        assert "eval/mini_choice_dates/acc" not in metrics_of(run)


@pytest.mark.slow
def test_on_a_cpu_a_batch_is_as_large_as_the_free_memory_allows(run, monkeypatch):
    from neo.evaluation import loading

    monkeypatch.setattr(loading, "free_bytes", lambda device: 5e6)
    evaluated(run, "tasks=mini_lab", "limit=2")
    (entry,) = read_record(run / "record.json").evaluations
    assert entry["batch_size"] in (2, 4, 8, 16)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 0.0)
    evaluated(run, "tasks=mini_lab", "limit=2", "rerun=true")
    assert read_record(run / "record.json").evaluations[0]["batch_size"] == 1


PROMPTS = {
    "messages": {"messages": [
        {"role": "user", "content": "Sort BA."}, {"role": "assistant", "content": "AB"}]},
    "sharegpt": {"conversations": [
        {"from": "human", "value": "Sort BA."}, {"from": "gpt", "value": "AB"}]},
    "alpaca": {"instruction": "Sort", "input": "BA.", "output": "AB"},
    "prompt_completion": {"prompt": "Sort BA.", "completion": "AB"},
}  # fmt: skip


@pytest.mark.slow
def test_prompts_of_every_schema_are_answered_and_kept_beside_the_reference(run, tmp_path):
    for schema, row in PROMPTS.items():
        file = tmp_path / f"{schema}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        assert evaluated(run, f"prompts={file}", "generate.max_gen_toks=9") == []
        (line,) = lines(run / "evaluation" / "student" / f"prompts-{schema}.jsonl")
        assert line["messages"][-1]["role"] == "user"
        assert line["reference"] == "AB"
        assert 0 < len(tokenizer()(line["answer"])["input_ids"]) <= 9


@pytest.mark.slow
def test_a_question_nobody_has_answered_is_a_prompt_and_one_too_long_is_said_to_be(run, tmp_path):
    file = tmp_path / "asked.jsonl"
    rows = ["Reverse AB.", "A " * 400]
    file.write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": row}]}) + "\n" for row in rows
    ))  # fmt: skip
    evaluated(run, f"prompts={file}", "models=student,base", "batch_size=1")
    for folder in (run / "evaluation" / "student", *run.parent.glob("base-*/evaluation/base")):
        answered, refused = lines(folder / "prompts-asked.jsonl")
        assert answered["answer"]
        assert "reference" not in answered
        assert "leave no room: the model takes 256" in refused["error"]
        assert "answer" not in refused


def test_the_prompts_answers_are_those_of_training(mini_lab, tmp_path):
    """The same rows through training's prompt, and through a file of prompts."""
    from neo.data.mini import mini_rows

    rows = [row for row in mini_rows("test", 40, seed=5) if row["kind"] == "dialogue"]
    file = tmp_path / "dialogue.jsonl"
    file.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows))
    evaluated(mini_lab, f"prompts={file}", "generate.max_gen_toks=13")
    folder = mini_lab / "evaluation" / "student"
    one, two = (lines(folder / f"{n}.jsonl") for n in ("prompts-dialogue", "mini_answer_dialogue"))
    assert [line["answer"] for line in one] == [line["answer"] for line in two]


REFUSED = {
    "tasks=mini_labb": "'mini_labb' is no task.*did you mean mini_lab",
    "tasks=": "tasks: name some",
    "tasks=mini_lab models=pupil": "models=.*pupil.*student, base, teacher",
    "tasks=mini_lab include_path=nowhere": "include_path='nowhere': there is no such folder",
    "prompts=nowhere.jsonl": "no such file",
    "tasks=mini_answer_dates generate.max_gen_toks=256": "mini_answer_dates may answer in 256",
    "tasks=mini_lab generate.temperature=-1": "generate.temperature=-1.0: must be at least 0",
    "tasks=mini_lab device=cuda:9": "device='cuda:9'",
    "tasks=mini_lab batch_size=most": "batch_size='most'",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    trained, monkeypatch, arguments
):
    from neo.evaluation.task_names import TaskNames

    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("neo.evaluation.evaluating.load", load)
    # the harness's own index, of thousands of files, is another test's
    monkeypatch.setattr(TaskNames, "_all", lambda self: self._small)
    with pytest.raises(ValueError, match=REFUSED[arguments]):
        evaluated(trained, *shlex.split(arguments))


def test_without_the_harness_the_line_that_installs_it_is_said(trained, monkeypatch):
    monkeypatch.setattr("neo.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llm-neo\[eval\]'"):
        evaluated(trained, "tasks=mini_lab")


@pytest.mark.slow
def test_a_run_without_a_teacher_has_none_to_evaluate(student_dir, tmp_path):
    fit(student_dir, None, tmp_path / "run", "method=lora", "trainer.max_steps=1")
    with pytest.raises(ValueError, match="models=teacher: the run has no teacher"):
        evaluated(tmp_path / "run", "tasks=mini_lab", "models=teacher")


def test_the_command_is_one_line_for_a_shell_whatever_the_paths_hold(tmp_path):
    settings = Settings(limit=3, chat=True, generation=Generation(temperature=0.5))
    command = harness_command(
        {"pretrained": "/a b/c,d", "dtype": "auto"}, "mini_lab", settings,
        batch_size=8, metadata=METADATA, folder=tmp_path,
    )  # fmt: skip
    words = shlex.split(command)
    assert words[:4] == ["lm_eval", "run", "--model", "hf"]
    said = dict(zip(words[4::2], words[5::2], strict=False))
    assert json.loads(said["--model_args"]) == {"pretrained": "/a b/c,d", "dtype": "auto"}
    assert "--apply_chat_template" in words
    given = json.loads(words[words.index("--gen_kwargs") + 1])
    assert given == {"temperature": 0.5, "do_sample": True}
    assert json.loads(words[words.index("--metadata") + 1]) == METADATA


def by_the_command(command, folder):
    """The numbers and the likelihoods that the harness's own command writes."""
    from neo.evaluation.measuring import numbers_of

    words = [sys.executable, "-m", *shlex.split(command), "--log_samples"]
    done = subprocess.run(
        [*words, "--output_path", str(folder)], capture_output=True, text=True, check=False
    )
    (file,) = folder.rglob("results_*.json")
    assert done.returncode == 0, done.stderr
    samples = {
        file.name.removeprefix("samples_").rpartition("_")[0]: lines(file)
        for file in folder.rglob("samples_*.jsonl")
    }
    return numbers_of(json.loads(file.read_text())["results"]), samples


@pytest.mark.slow
def test_the_harness_own_command_gives_the_numbers_of_an_adapter_and_of_merged_weights(
    trained, tmp_path
):
    run = shutil.copytree(trained, tmp_path / "one")
    said = subprocess.run(
        [sys.executable, "-m", "neo.evaluate", f"run={run}", "tasks=mini_lab", "device=cpu"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    ours = metrics_of(run)
    (command,) = (line.strip() for line in said.splitlines() if "lm_eval run" in line)
    found, samples = by_the_command(command, tmp_path / "printed")
    assert found.items() <= ours.items()
    assert len(found) == 48
    ours_of = {file.stem: lines(file) for file in (run / "evaluation" / "student").glob("*.jsonl")}
    assert ours_of.keys() == samples.keys()
    export(run, tmp_path / "adapter")
    export(run, tmp_path / "merged", merge=True)
    base = str(MINI / "student")
    exported = {
        "adapter": {"pretrained": base, "peft": str(tmp_path / "adapter"), "dtype": "auto"},
        "merged": {"pretrained": str(tmp_path / "merged"), "dtype": "auto"},
    }
    from neo.evaluation.task_names import TASKS

    for name, arguments in exported.items():
        command = harness_command(
            arguments, "mini_lab", Settings(), batch_size=64, metadata=METADATA, folder=TASKS
        )
        found, samples = by_the_command(command, tmp_path / f"of-{name}")
        assert found.items() <= ours.items()
        for task, rows in samples.items():
            for one, two in zip(ours_of[task], rows, strict=True):
                if task.startswith("mini_answer"):
                    assert one["answer"] == two["resps"][0][0]
                    continue
                mine = [choice["loglikelihood"] for choice in one["answer"]]
                theirs = [float(response[0][0]) for response in two["resps"]]
                # W + BA is rounded once more than Wx + BAx: merged weights differ in the last bits
                assert mine == (theirs if name == "adapter" else pytest.approx(theirs, rel=1e-5))


@pytest.mark.slow
def test_the_sets_of_the_papers_tasks_are_known_to_the_harness():
    from neo.evaluation.task_names import TaskNames

    names = TaskNames()
    general = ["arc_challenge", "arc_easy", "ceval-valid", "cmmlu", "mmlu", "hellaswag"]
    assert names.units(["paper_general"]) == [*general, "winogrande"]
    assert names.units(["paper_math"]) == ["gsm8k", "asdiv", "svamp", "mawps", "mathqa"]
    assert names.units(["mini_lab", "mini_lab"]) == ["mini_lab"]
    assert len(names.units(["mmlu_high_school_*"])) > 10
    with pytest.raises(ValueError, match=r"(?s)'arc_esy'.*did you mean arc_easy"):
        names.units(["arc_esy"])
