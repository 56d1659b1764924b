import json
import math

import numpy as np
import pytest

from bnjax.data import DataError
from bnjax.studies import STUDIES, Options
from bnjax.studies.claims import Claim, Condition
from bnjax.studies.ledger import Saved, claims_of, make_ledger
from bnjax.studies.statistics import interval, prediction_interval


class Made:
    """Results made up: `{variant: {metric: values}}`."""

    def __init__(self, numbers, **settings):
        self.numbers, self.settings = numbers, settings
        self.seeds = range(len(next(iter(next(iter(numbers.values())).values()))))

    def values(self, variant, metric):
        values = self.numbers.get(variant, {}).get(metric)
        return None if values is None else np.array(values, float)


RECORD = Made({"a": {"m": [1.0, 2.0, 3.0]}, "b": {"m": [0.9, 2.1, 2.7]}, "c": {"m": [1.0, math.nan, 1.0]}}, epochs=7)


def claim(*conditions, **options):
    return Claim("X", "a source", "statement", "–", "rule", conditions, **options)


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        (Condition("", "m", "a", low=-1, high=5), True),
        (Condition("", "m", "a", low=5), False),
        (Condition("", "m", "a", low=2), None),
        (Condition("", "m", "a", "b", low=-1, high=1), True),
        (Condition("", "m", "a", "b", low=0), None),
        (Condition("", "m", "c", high=2), None),  # a seed lacks a value
        (Condition("", "m", "nothing", high=2), None),
        (Condition("", "n", "a", high=2), None),
        (Condition("", "m", "a", low=6, high=6, one_run=True), True),
        (Condition("", "m", "a", low=8, high=8, one_run=True), False),
    ],
)
def test_conditions(condition, met):
    outcome = condition.judge(RECORD)
    assert outcome.met is met
    if condition.variant == "a" and condition.metric == "m":
        values = np.array([1.0, 2.0, 3.0]) - (np.array([0.9, 2.1, 2.7]) if condition.minus else 0)
        assert outcome.measured == (prediction_interval if condition.one_run else interval)(values)
        if condition.minus:
            np.testing.assert_allclose(outcome.effect, values.mean() / values.std(ddof=1))


def test_verdicts():
    yes, no, unknown = (Condition("", "m", "a", low=low) for low in (-9, 9, 2))
    assert claim(yes, yes).judge(RECORD).verdict == "reproduced"
    assert claim(yes, unknown).judge(RECORD).verdict == "undecided"
    assert claim(unknown, no).judge(RECORD).verdict == "not reproduced"
    assert claim(no, is_arithmetic=True).judge(RECORD).verdict == "wrong in the source"
    assert claim(yes, needs={"epochs": 7}).judge(RECORD).verdict == "reproduced"
    other = claim(yes, needs={"epochs": 8, "dataset": "mnist"}).judge(RECORD)
    assert other.verdict == "undecided" and other.measured == "needs epochs 8, dataset mnist"


def test_one_seed_decides_nothing():
    alone = Made({"a": {"m": [1.0]}})
    assert claim(Condition("", "m", "a", low=0)).judge(alone).verdict == "undecided"


def test_texts():
    judged = claim(Condition("gain", "m", "a", "b", low=0, digits=2), Condition("lost", "m", "z")).judge(RECORD)
    assert judged.measured == "gain 0.10 ± 0.50; lost not measured" and judged.effect == "+0.5"
    run = claim(Condition("accuracy", "m", "a", low=2, high=2, one_run=True, digits=1)).judge(RECORD)
    assert run.measured == "accuracy 2.0 [-3.0, 7.0]"


def test_every_claim_is_told_apart_and_complete():
    found = [one for study in STUDIES.values() for one in claims_of(study)]
    ids = [one.id for one in found]
    assert len(ids) == len(set(ids)) >= 40
    for one in found:
        assert one.source and one.statement and one.published and one.rule and one.conditions
        assert all(condition.low > -math.inf or condition.high < math.inf for condition in one.conditions)


def test_ledger_runs_what_is_missing_only(tmp_path):
    ran = []

    def options_of(study):
        return [] if study.name == "cifar" else [Options(seeds=2)]

    def run(study, options, directory):
        if study.name == "mnist":
            raise DataError("no network")
        ran.append(study.name)
        directory.mkdir()
        numbers = {
            "after": {"test_accuracy": {"values": [0.84, 0.841]}},
            "none": {"test_accuracy": {"values": [0.84, None]}},
        }
        document = {
            "schema": 2,
            "options": options.to_json(),
            "settings": {"epochs": 100},
            "seeds": [0, 1],
            "variants": {
                name: {"label": name, "settings": {}, "metrics": metrics} for name, metrics in numbers.items()
            },
        }
        (directory / "results.json").write_text(json.dumps(document))

    names = ["circles", "mnist", "cifar"]
    ledger = make_ledger(names, options_of, tmp_path, run, lambda text: None)
    assert ran == ["circles"] and ledger.seeds == {"circles": 2}
    by_id = {judgement.claim.id: judgement for judgement in ledger.judgements}
    assert "not measured" not in by_id["S1.1"].measured and by_id["S1.1"].verdict == "undecided"
    assert by_id["S2.1"].measured == "not run: no network" and by_id["S5.1"].measured == "left out by --fast"
    again = make_ledger(names, options_of, tmp_path, run, lambda text: None)
    assert ran == ["circles"] and again.rows() == ledger.rows()
    ledger.save(tmp_path)
    document = json.loads((tmp_path / "ledger.json").read_text())
    assert [entry["id"] for entry in document["claims"]] == list(by_id)
    assert (tmp_path / "ledger.md").read_text().count("\n| S") == len(by_id)


def test_damaged_results_count_as_missing(tmp_path):
    assert Saved.load(tmp_path) is None
    (tmp_path / "results.json").write_text("{")
    assert Saved.load(tmp_path) is None
    (tmp_path / "results.json").write_text('{"schema": 1}')
    assert Saved.load(tmp_path) is None
