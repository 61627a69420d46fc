import pytest

from neo.evaluation.settings import Generation, Settings, batch_size_of

ILLEGAL = {
    "num_fewshot=-1": "num_fewshot=-1: must be at least 0",
    "limit=0": "limit=0: must be a whole number",
    "limit=2.5": "limit=2.5: must be a whole number",
    "batch_size=0": "batch_size=0: must be auto or at least 1",
    "dtype=int8": "dtype='int8': must be one of auto, float32",
    "device=gpu": "device='gpu': must be auto, cpu, cuda",
    "device=meta": "device='meta': must be auto, cpu, cuda",
    "seed=-1": "seed=-1: must be at least 0",
}
ILLEGAL_GENERATION = {
    "temperature=-0.1": "must be at least 0",
    "temperature=inf": "must be at least 0",
    "temperature=nan": "must be at least 0",
    "top_p=0.0,temperature=1.0": "top_p=0.0: must be above 0 and at most 1",
    "top_p=1.01,temperature=1.0": "at most 1",
    "top_k=-1,temperature=1.0": "top_k=-1: must be at least 0",
    "min_p=2.0,temperature=1.0": "min_p=2.0: must be from 0 to 1",
    "repetition_penalty=0.0": "repetition_penalty=0.0: must be above 0",
    "max_gen_toks=0": "max_gen_toks=0: must be at least 1",
    "do_sample=True": "needs generate.temperature above 0",
    "do_sample=False,temperature=0.7": "do_sample=false is greedy",
    "top_p=0.9": "greedy answers do not heed it",
    "top_k=5,temperature=0.0": "greedy answers do not heed it",
}


def values(text):
    legal = {"True": True, "False": False, "inf": float("inf"), "nan": float("nan")}

    def read(value):
        if value in legal:
            return legal[value]
        if value.lstrip("-").replace(".", "", 1).isdigit():
            return float(value) if "." in value else int(value)
        return value

    return {key: read(value) for key, _, value in (p.partition("=") for p in text.split(","))}


@pytest.mark.parametrize("text", ILLEGAL)
def test_an_illegal_setting_is_named_with_what_would_be_legal(text):
    (problem,) = Settings(**values(text)).problems()
    assert problem.startswith(ILLEGAL[text])


@pytest.mark.parametrize("text", ILLEGAL_GENERATION)
def test_an_illegal_sampling_is_named_with_what_would_be_legal(text):
    problems = Generation(**values(text)).problems()
    assert any(ILLEGAL_GENERATION[text] in problem for problem in problems), problems
    assert all(problem.startswith("generate.") for problem in problems)


def test_a_task_keeps_its_own_generation_where_nothing_is_said():
    assert Generation().problems() == []
    assert Generation().given() == {}
    assert Settings(limit=0.5, num_fewshot=0, seed=0).problems() == []


def test_a_temperature_decides_whether_answers_are_sampled():
    assert Generation(temperature=0.7, top_k=5).given() == {
        "temperature": 0.7,
        "top_k": 5,
        "do_sample": True,
    }
    # a task of its own may say do_sample: true
    assert Generation(temperature=0.0).given() == {"temperature": 0.0, "do_sample": False}


def test_where_and_how_many_at_once_decide_no_number():
    one, two = Settings(batch_size=1, device="cpu"), Settings(batch_size=64, device="mps")
    assert one.deciding() == two.deciding()
    for name, value in (("limit", 3), ("seed", 1), ("chat", True), ("dtype", "float16")):
        assert Settings(**{name: value}).deciding() != Settings().deciding()


@pytest.mark.parametrize("given", ["most", True, 1.5, [1]])
def test_a_batch_size_is_auto_or_a_whole_number(given):
    assert batch_size_of("auto") is None
    assert batch_size_of(8) == 8
    with pytest.raises(ValueError, match=r"batch_size=.*must be auto or a whole number"):
        batch_size_of(given)
