import pytest

from neo.results.metrics import FIELDS, METRICS, field_info, metric_info, quantity
from neo.results.records import RunRecord


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_found_under_its_own_name(name):
    assert metric_info(name).name == name


@pytest.mark.parametrize("metric", [*METRICS.values(), *FIELDS.values()], ids=lambda m: m.name)
def test_every_number_has_a_unit_a_description_and_a_legal_direction(metric):
    assert metric.unit
    assert metric.description
    assert metric.better in ("higher", "lower", None)
    assert metric.decimals >= 0


def test_a_misspelt_metric_is_refused_with_the_name_that_was_meant():
    with pytest.raises(ValueError, match=r"'val/agrement'.*val/agreement"):
        metric_info("val/agrement")


@pytest.mark.parametrize(
    "name", ["", "eval", "eval/mini", "eval//exact_match", "eval/a/b/c/d", "x/eval/a/b", "loss"]
)
def test_a_name_outside_the_table_and_the_pattern_is_refused(name):
    with pytest.raises(ValueError, match="unknown metric"):
        metric_info(name)


@pytest.mark.parametrize("name", ["eval/mini/exact_match", "eval/mini/exact_match/two_step"])
def test_shares_of_an_evaluation_are_printed_in_percent(name):
    metric = metric_info(name)
    assert (metric.printed_unit, metric.scale, metric.better) == ("%", 100.0, "higher")


def test_a_standard_error_has_no_better_end():
    assert metric_info("eval/arc_easy/acc_stderr").better is None


def test_perplexity_is_better_when_lower():
    assert metric_info("eval/wikitext/word_perplexity").better == "lower"


def test_every_field_with_a_number_exists_in_a_record():
    assert set(FIELDS) <= set(RunRecord.__dataclass_fields__)


def test_an_unknown_field_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match="num_trainable_parameters"):
        field_info("trainable")


def test_a_quantity_is_a_field_or_a_metric_and_nothing_else():
    assert quantity("seconds")[1] is True
    assert quantity("val/ce")[1] is False
    with pytest.raises(ValueError, match=r"unknown metric 'second'.*unknown record field"):
        quantity("second")
