"""What a certificate finds where a cache is right, where it is rounded, and where it is wrong."""

import functools
import json

import pytest
import torch
from caches import KINDS, ROWS, small_shards, typed, write
from found_divergences import divergence_functions
from lab import write_rows

from neo.losses.distillation import Distillation
from neo.losses.divergences import forward_kl, jsd, reverse_kl
from neo.losses.given import HiddenStates
from neo.losses.head import Head
from neo.teachers.durable import CacheError
from neo.teachers.measure import measured
from neo.teachers.store import CacheFolder
from neo.training import cache_models
from neo.training import certificate as certificates
from neo.training.certificate import (
    bytes_per_token,
    certificate_lines,
    certificate_metrics,
    certified_divergences,
    certified_keys,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def certificate_of(folder, student_dir, teacher_dir):
    rows = write_rows(folder / "rows.jsonl", ROWS)
    found = {}

    def certificate_of(*more):
        if more not in found:
            out = folder / f"cache-{len(found)}"
            write(out, typed(student_dir, teacher_dir, rows, *more))
            found[more] = CacheFolder.open(out)
        return found[more].manifest.certificate, found[more]

    return certificate_of


def errors(certificate):
    return {
        (one["divergence"], one["temperature"]): (abs(one["kd_error"]), one["gradient_error"])
        for one in certificate["measured"]
    }


def test_what_is_exact_is_found_exact(certificate_of):
    certificate, _ = certificate_of(*KINDS["projected"])
    assert errors(certificate).keys() == {("forward_kl", 1.0)}
    assert max(errors(certificate)["forward_kl", 1.0]) < 1e-6
    certificate, cache = certificate_of(*KINDS["hidden"])
    assert cache.manifest.stored.values == "float32"
    every = {(name, t) for name in certified_divergences() for t in (1.0, 2.0)}
    assert errors(certificate).keys() == every
    assert max(max(both) for both in errors(certificate).values()) < 1e-6


def test_what_is_rounded_or_left_out_is_found_in_the_order_of_its_size(certificate_of):
    least, _ = certificate_of("teacher.kind=top_k", "teacher.k=200")
    most, _ = certificate_of(*KINDS["top_k"])
    of = [errors(one)["forward_kl", 1.0][1] for one in (least, most)]
    assert 1e-4 < of[0] < of[1]
    assert 0 < least["mass_left_out"] < most["mass_left_out"] < 1
    assert most["mass_listed"] == pytest.approx(1 - most["mass_left_out"], abs=1e-5)


@pytest.mark.slow
def test_integers_are_less_exact_than_floats_and_more_than_lists(certificate_of):
    of = [
        errors(certificate_of(*kind)[0])["forward_kl", 1.0][1]
        for kind in (KINDS["projected"], KINDS["int8"], ("teacher.kind=top_k", "teacher.k=200"))
    ]
    assert of[0] < 1e-6 < of[1] < of[2]


def test_nothing_is_left_out_of_a_sample_and_only_forward_kl_is_taken_of_it(certificate_of):
    certificate, _ = certificate_of(*KINDS["sampled"])
    assert errors(certificate).keys() == {("forward_kl", 1.0)}
    assert certificate["mass_left_out"] == 0 < certificate["mass_listed"] < 1


@pytest.mark.parametrize("kind", ["projected", pytest.param("hidden", marks=pytest.mark.slow)])
def test_a_cache_that_is_wrong_throughout_shows_it(certificate_of, monkeypatch, kind):
    def altered(given, *arguments):
        return measured(HiddenStates(hidden=given.hidden * 1.01, head=given.head), *arguments)

    monkeypatch.setattr(cache_models, "measured", altered)
    certificate, _ = certificate_of(*KINDS[kind], "data.batch_size=2")
    assert errors(certificate)["forward_kl", 1.0][1] > 1e-3


@pytest.mark.parametrize("kind", ["top_k", "projected"])
def test_however_many_tokens_are_compared_at_a_time(certificate_of, monkeypatch, kind):
    whole, _ = certificate_of(*KINDS[kind])
    monkeypatch.setattr("neo.training.certificate.TOKENS", 7)
    parts, _ = certificate_of(*KINDS[kind], "data.batch_size=3")
    assert parts["tokens"] == whole["tokens"] > 7
    for one, other in zip(parts["measured"], whole["measured"], strict=True):
        assert one["kd"] == pytest.approx(other["kd"], rel=1e-4)
        for error in ("kd_error", "gradient_error", "largest_gradient_error"):
            assert one[error] == pytest.approx(other[error], rel=1e-2, abs=1e-6)


def test_rows_are_spread_over_the_cache_and_bytes_are_those_on_the_disk(certificate_of):
    certificate, cache = certificate_of(*KINDS["hidden"])
    keys = cache.keys()
    chosen = certified_keys(cache)
    assert (chosen[0], chosen[-1], len(chosen)) == (keys[0], keys[-1], 16)
    assert [key.row_id for key in certified_keys(cache, first=10)] == [
        i for i in range(10) if i % 7
    ]
    assert certificate["tokens"] == sum(map(cache.num_tokens, chosen))
    files = [f for f in cache.path.iterdir() if f.suffix in (".bin", ".index", ".safetensors")]
    size = sum(file.stat().st_size for file in files)
    assert bytes_per_token(cache) * cache.manifest.counts["tokens"] == pytest.approx(size, rel=1e-5)
    assert certificate["bytes_per_token"] == bytes_per_token(cache)


def test_every_divergence_is_certified():
    assert certified_divergences() == divergence_functions()


def test_a_damaged_row_and_one_of_other_tokens_are_not_certified(
    tmp_path, student_dir, teacher_dir, monkeypatch
):
    words = typed(student_dir, teacher_dir, write_rows(tmp_path / "rows.jsonl", ROWS))
    with small_shards():
        with monkeypatch.context() as patch:
            patch.setattr("neo.training.certificate.content_of", lambda *_: 7)
            with pytest.raises(CacheError, match="row 1 is of other tokens"):
                write(tmp_path / "cache", words)
        file = tmp_path / "cache" / "shard-00000.bin"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        with pytest.raises(CacheError, match="is damaged at row 1"):
            write(tmp_path / "cache", words)


def test_it_is_told_in_a_few_lines(certificate_of):
    certificate, _ = certificate_of(*KINDS["top_k"])
    head, *lines = certificate_lines(certificate)
    assert f"{certificate['bytes_per_token']:,.1f} bytes a token" in head
    assert "% left out" in head
    assert len(lines) == len(certificate["measured"])
    assert lines[0].startswith("  forward_kl at T=1: kd ")
    nothing = {**certificate, "measured": [{**certificate["measured"][0], "kd_error": None}]}
    assert "off by infinite" in certificate_lines(nothing)[1]


def test_a_run_records_the_numbers_of_its_own_divergence_alone(certificate_of):
    certificate, _ = certificate_of(*KINDS["top_k"])
    own = {one["divergence"]: one for one in certificate["measured"]}

    def metrics(divergence, temperature=1.0):
        return certificate_metrics(
            certificate, Distillation(divergence=divergence, temperature=temperature)
        )

    for divergence, name in ((reverse_kl, "reverse_kl"), (functools.partial(jsd, beta=0.5), "jsd")):
        assert metrics(divergence) == {
            "cache/bytes_per_token": certificate["bytes_per_token"],
            "cache/mass_left_out": certificate["mass_left_out"],
            "cache/kd_error": own[name]["kd_error"],
            "cache/gradient_error": own[name]["gradient_error"],
        }
    assert "cache/kd_error" not in metrics(functools.partial(jsd, beta=0.1))
    assert "cache/kd_error" not in metrics(forward_kl, temperature=2.0)
    assert certificate_metrics(None, Distillation()) == {}


def test_a_certificate_is_json_and_knows_no_time(certificate_of):
    certificate, _ = certificate_of(*KINDS["hidden"])
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert certificate.keys() == {"rows", "tokens", "measured", "bytes_per_token"}


def test_errors_that_are_no_numbers_are_none(monkeypatch):
    gradient = torch.ones(2, 3, dtype=torch.float64)
    kinds = iter([(2.0, gradient), (float("inf"), gradient * 2)])
    monkeypatch.setattr(certificates, "_kd", lambda *_: next(kinds))
    given = HiddenStates(hidden=torch.ones(2, 3), head=Head(weight=torch.ones(5, 3)))
    found = certificates._compared(
        given.hidden,
        given.head,
        (given, given),
        torch.ones(2).long(),
        Distillation(divergence=forward_kl),
        5,
    )
    assert (found["kd"], found["kd_error"]) == (1.0, None)
    assert found["gradient_error"] == found["largest_gradient_error"] == 1.0
