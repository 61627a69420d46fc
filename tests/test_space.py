import pytest

from neo.training.space import Choices, Numbers, grid, read_space, typed


def space_of(**params):
    return read_space({key.replace("__", "."): value for key, value in params.items()}, [])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(1e-5,1e-1)", Numbers(1e-5, 0.1)),
        ("tag(log, interval(1e-5,1e-1))", Numbers(1e-5, 0.1, log=True)),
        ("int(interval(1,8))", Numbers(1, 8, step=1)),
        ("tag(log,int(interval(1,64)))", Numbers(1, 64, log=True, step=1)),
        ("range(1,9,2)", Numbers(1, 7, step=2)),  # Hydra's ranges end before their end
        ("range(0,1,0.25)", Numbers(0.0, 0.75, step=0.25)),
        ("choice(8,16,32)", Choices(("8", "16", "32"))),
        ("8,16", Choices(("8", "16"))),
        ("choice([q_proj,v_proj],all-linear)", Choices(("[q_proj,v_proj]", "all-linear"))),
    ],
)
def test_a_dimension_is_written_in_hydras_grammar(text, expected):
    assert space_of(x=text) == {"x": expected}


def test_what_holds_no_sweep_is_shared_by_all_trials_and_the_command_line_counts_more():
    params = {"optim.lr": "interval(0,1)", "lora.r": 8, "data.batch_size": "2,4", "seed": 3}
    space, fixed = read_space(
        params, ["experiment=x", "lora=dora,pissa", "++data.batch_size=8", "++lora.r=4,16"]
    )
    assert space == {
        "optim.lr": Numbers(0.0, 1.0),
        "lora": Choices(("dora", "pissa")),
        "lora.r": Choices(("4", "16")),
    }
    assert fixed == ["seed=3", "experiment=x", "++data.batch_size=8"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("interval(1,1)", "from 1 to 1: the first must be below"),
        ("interval(2,1)", "from 2 to 1: the first must be below"),
        ("interval(0,inf)", "from 0 to inf"),
        ("tag(log,interval(0,1))", "from 0 with log: must begin above 0"),
        ("tag(logg,interval(1,2))", "tag logg means nothing here; legal: log"),
        ("range(5,5)", r"range\(5,5\) is empty"),
        ("range(5,6)", "from 5 to 5"),
        ("tag(log,range(1,9,2))", "a step of 2 with log"),
        ("glob(*)", r"glob\(\*\) cannot be searched; legal: choice"),
        ("choice(8)", "two choices at least"),
        ("choice(8,8)", "two choices at least, each once"),
        ("intervall(1,2)", "Unknown function 'intervall'"),
        ("8", "nothing is searched; give a key choice"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_named(text, problem):
    with pytest.raises(ValueError, match=problem):
        space_of(x=text)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)optim\.lr: from 1 to 0.*lora\.r: choice\(8\): two"):
        space_of(optim__lr="interval(1,0)", lora__r="choice(8)")


def test_a_grid_has_every_point_once_and_points_are_typed_as_overrides():
    space = space_of(lora="lora,dora", optim__lr="range(0.1,0.35,0.1)", seed="range(3,5)")
    points = list(grid(space))
    assert len({tuple(point.values()) for point in points}) == len(points) == 2 * 3 * 2
    assert points[1] == {"lora": "lora", "optim.lr": 0.1, "seed": 4}
    assert typed(points[-1]) == ["lora=dora", "++optim.lr=0.3", "seed=4"]


def test_an_interval_has_no_grid():
    with pytest.raises(ValueError, match=r"optim\.lr cannot be listed"):
        list(grid(space_of(lora="lora,dora", optim__lr="interval(0,1)")))
