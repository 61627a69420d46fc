from importlib.util import find_spec

import pytest

from neo.evaluation.word_problems import first_number, same_number

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="pip install 'llm-neo[eval]'"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7.0),
        (" 1,450 apples, not 3", 1450.0),
        ("$12.50.", 12.5),
        ("it is -3", -3.0),
        ("3/4 of it", 0.75),
        ("3/0", None),
        (".5", 0.5),
        ("none", None),
        ("", None),
    ],
)
def test_the_first_number_of_an_answer_is_found(text, expected):
    assert first_number(text) == expected


def test_an_answer_is_right_however_its_number_is_written():
    for given in ("145", "145.0 bananas", " $145"):
        assert same_number({"Answer": "145"}, [given]) == {"exact_match": 1.0}
    for given in ("146", "about 1450", "", "none"):
        assert same_number({"result": "145.0"}, [given]) == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="'many' holds no number"):
        same_number({"Answer": "many"}, ["1"])


# Rows as the hub's data sets have them.
STAND_INS = {
    "svamp": (
        "ChilleD/SVAMP",
        {"ID": "chal-1", "Body": "Ann has 5 pens. ", "Question": "How many pens has she?",
         "Equation": "( 5.0 )", "Answer": "5", "Type": "Addition",
         "question_concat": "Ann has 5 pens. How many pens has she?"},
        "Question: Ann has 5 pens. How many pens has she?\nAnswer:",
    ),
    "mawps": (
        "MU-NLPC/Calc-mawps",
        {"id": "mawps__1", "question": "Ann has 5 pens. How many pens has she?", "chain": "5",
         "result": "5", "result_float": 5.0, "equation": "x=5", "expression": "5"},
        "Question: Ann has 5 pens. How many pens has she?\nAnswer:",
    ),
}  # fmt: skip


@needs_harness
@pytest.mark.parametrize("name", STAND_INS)
def test_a_word_problem_is_asked_from_the_columns_of_its_data_set(name, monkeypatch):
    import datasets

    from neo.evaluation.measuring import load_unit
    from neo.evaluation.task_names import TaskNames

    path, row, prompt = STAND_INS[name]
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append((path, name, kwargs))
        rows = datasets.Dataset.from_list([row] * 6)
        return datasets.DatasetDict(train=rows, test=rows.select([0, 1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_unit(name, TaskNames().manager([name], {})).tasks[name]
    assert asked == [(path, None, {})]
    task.set_fewshot_seed(seed=0)
    task.build_all_requests()
    text, how = task.instances[0].args
    assert text.endswith(f"\n\n{prompt}")
    assert text.count(f"{prompt} 5\n\n") == task.get_config("num_fewshot") == 5
    assert how["max_gen_toks"] == 64
    assert task.process_results(row, [" 5 pens"]) == {"exact_match": 1.0}
