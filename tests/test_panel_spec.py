import pytest

from neo.results.panel_spec import read_panel

LEGAL = [
    {"kind": "bars", "x": ["eval/mini/exact_match", "eval/mini/exact_match/*"]},
    {"kind": "curves", "y": "val/kd"},
    {"kind": "curves", "x": "tokens", "y": "val/kd", "by": "lora"},
    {"kind": "scatter", "x": "num_trainable_parameters", "y": "val/kd"},
    {"kind": "seeds", "x": "val/kd"},
    {"kind": "pareto", "x": "peak_memory_gib", "y": "eval/mini/exact_match"},
    {"kind": "sweep", "x": "optim.lr", "y": "seconds", "by": "lora"},
    {"kind": "parallel", "x": ["lora", "optim.lr"], "y": "val/kd", "name": "all-runs_1"},
    {"kind": "heatmap", "x": "lora", "y": "optim.lr", "z": "val/kd"},
]


@pytest.mark.parametrize("node", LEGAL, ids=lambda n: n["kind"])
def test_every_kind_of_panel_is_read(node):
    panel = read_panel(node, "figures[0]")
    assert panel.kind == node["kind"]
    named = {name for names in (*panel.keys.values(), *panel.numbers.values()) for name in names}
    given = {
        name
        for entry in ("x", "y", "z", "by")
        for name in ([node[entry]] if isinstance(node.get(entry), str) else node.get(entry, []))
    }
    assert named == given - {"tokens", "step"}


def test_panels_over_keys_are_those_that_need_a_key():
    over_keys = [read_panel(node, "") for node in LEGAL if read_panel(node, "").over_keys]
    assert [panel.kind for panel in over_keys] == ["curves", "sweep", "parallel", "heatmap"]
    assert over_keys[-1].keys == {"by": [], "x": ["lora"], "y": ["optim.lr"]}
    assert over_keys[-1].numbers == {"z": ["val/kd"]}


WRONG = [
    ({"kind": "pie", "x": "val/kd"}, r"kind: 'pie', legal: bars, .*heatmap"),
    ({"kind": "sweep", "x": "optim.lr", "y": "val/kd", "z": "val/ce"}, r"\.z: only a heatmap"),
    ({"kind": "sweep", "x": "optim.lr"}, "sweep need one x and one y"),
    ({"kind": "sweep", "x": ["optim.lr", "lora"], "y": "val/kd"}, "sweep need one x and one y"),
    ({"kind": "sweep", "y": "val/kd"}, r"'figures\[3\]\.x' is missing; a sweep panel needs"),
    ({"kind": "sweep", "x": "optim.lr", "y": "val/kdd"}, r"unknown metric 'val/kdd'.*val/kd"),
    ({"kind": "sweep", "x": "val/ce", "y": "val/kd"}, r"\.x: 'val/ce' is a number that comes out"),
    ({"kind": "sweep", "x": "seconds", "y": "val/kd"}, r"\.x: 'seconds' is a number.*legal: a con"),
    (
        {"kind": "sweep", "x": "lora", "y": "val/kd", "by": "lora"},
        r"\.x: 'lora' stands in this panel more than once",
    ),
    ({"kind": "sweep", "x": "lora", "y": "val/kd", "by": 3}, r"'figures\[3\]\.by' is 3, not of"),
    ({"kind": "sweep", "x": "lora", "y": "val/kd", "bye": "r"}, "'figures.3..bye' is unknown"),
    ({"kind": "curves", "y": "val/kd", "by": "val/ce"}, r"\.by: 'val/ce' is a number"),
    ({"kind": "curves", "x": "epoch", "y": "val/kd"}, "'epoch', legal for curves: step, tokens"),
    ({"kind": "bars", "x": "val/kd", "by": "lora"}, r"\.by: bars have none; legal for curves and"),
    ({"kind": "heatmap", "x": "lora", "y": "optim.lr", "z": "val/kd", "by": "seed"}, r"\.by: heat"),
    ({"kind": "heatmap", "x": "lora", "y": "optim.lr"}, "needs one key in x, one in y, and a num"),
    ({"kind": "heatmap", "x": "lora", "z": "val/kd"}, "needs one key in x, one in y, and a number"),
    ({"kind": "heatmap", "x": ["a", "b"], "y": "c", "z": "val/kd"}, "needs one key in x"),
    ({"kind": "heatmap", "x": "lora", "y": "val/ce", "z": "val/kd"}, r"\.y: 'val/ce' is a number"),
    ({"kind": "heatmap", "x": "lora", "y": "lora", "z": "val/kd"}, r"\.y: 'lora' stands in this"),
    ({"kind": "heatmap", "y": "lora", "z": "val/kd"}, r"'figures\[3\]\.x' is missing"),
    ({"kind": "parallel", "x": "lora", "y": "val/kd"}, "need two or more keys in x, and a y"),
    ({"kind": "parallel", "x": ["lora", "optim.lr"]}, "need two or more keys in x, and a y"),
    ({"kind": "parallel", "x": ["lora", "lora"], "y": "val/kd"}, r"\.x: 'lora' stands in this"),
    ({"kind": "parallel", "x": ["lora", 3], "y": "val/kd"}, r"\.x\[1\]: 3 is not a text"),
    ({"kind": "parallel", "x": ["lora", "val/ce"], "y": "val/kd"}, r"\.x: 'val/ce' is a number"),
    ({"kind": "pareto", "x": "seconds"}, "pareto need one x and one y"),
    (
        {"kind": "pareto", "x": "num_trainable_parameters", "y": "val/kd"},
        r"\.x: num_trainable_parameters has no better end.*a scatter shows it",
    ),
    ({"kind": "pareto", "x": "seconds", "y": "train/lr"}, r"\.y: train/lr has no better end"),
    ({"kind": "pareto", "x": "seconds", "y": "optim.lr"}, "unknown metric 'optim.lr'"),
    ({"kind": "scatter", "x": "seconds", "y": "val/kd", "log": True}, "scatter have none; legal"),
    ({"kind": "seeds", "x": "val/kd", "name": "../x"}, r"\.name: '\.\./x', legal: letters, dig"),
    ({"kind": "seeds", "x": "val/kd", "name": 1}, "'figures.3..name' is 1, not of type str"),
]


@pytest.mark.parametrize(("node", "message"), WRONG)
def test_a_panel_that_cannot_be_drawn_is_refused_naming_its_place(node, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_panel(node, "figures[3]")
    assert "figures[3]" in str(refused.value)
