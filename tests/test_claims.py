import datetime
import json
import math
import os
import re

import numpy as np
import pytest

from bnjax.studies import (
    STUDIES,
    Options,
    activations,
    cifar,
    circles,
    mnist,
    perceptrons,
    recurrent,
    sensitivity,
    smoothness,
    vgg,
)
from bnjax.studies.cli import console
from bnjax.studies.data import DataError
from bnjax.studies.evidence.claims import AtLeast, Claim, Condition, read_claims
from bnjax.studies.evidence.ledger import saved_runs
from bnjax.studies.evidence.results import Results, save
from bnjax.studies.evidence.statistics import interval, prediction_interval


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
        (Condition("", "m", "a", low=1, high=3, every_seed=True), True),
        (Condition("", "m", "a", low=1.5, every_seed=True), False),  # the interval of the mean would leave that open
        (Condition("", "m", "c", low=0, every_seed=True), None),
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
    flags = claim(yes, needs={"full_length": True, "augmented": False}).judge(RECORD)
    assert flags.measured == "needs full length, not augmented"
    assert claim(yes, needs={"epochs": AtLeast(7)}).judge(RECORD).verdict == "reproduced"
    longer = claim(yes, needs={"epochs": AtLeast(8), "steps": AtLeast(1000)}).judge(RECORD)
    assert longer.measured == "needs epochs of at least 8, steps of at least 1,000"


def test_one_seed_decides_nothing():
    alone = Made({"a": {"m": [1.0]}})
    assert claim(Condition("", "m", "a", low=0)).judge(alone).verdict == "undecided"


def test_texts():
    judged = claim(Condition("gain", "m", "a", "b", low=0, digits=2), Condition("lost", "m", "z")).judge(RECORD)
    assert judged.measured == "gain 0.10 ± 0.50 (d +0.5); lost not measured"
    difference = claim(Condition("gain", "m", "a", low=0, is_difference=True, digits=1)).judge(RECORD)
    assert difference.measured == "gain 2.0 ± 2.5 (d +2.0)"
    run = claim(Condition("accuracy", "m", "a", low=2, high=2, one_run=True, digits=1)).judge(RECORD)
    assert run.measured == "accuracy 2.0 [-3.0, 7.0]"


def test_every_claim_is_told_apart_and_complete():
    found = [one for study in STUDIES.values() for one in study.load().CLAIMS]
    ids = [one.id for one in found]
    assert len(ids) == len(set(ids)) >= 40
    for one in found:
        assert one.source and one.statement and one.published and one.rule and one.conditions
        assert all(condition.low > -math.inf or condition.high < math.inf for condition in one.conditions)


def test_numbers_in_the_rules_are_those_of_the_studies():
    claims = {claim.id: claim for study in STUDIES.values() for claim in study.load().CLAIMS}
    small = f"trained on {sensitivity.SMALL_SET} images"
    sweeps = {sweep: ", ".join(f"{value:g}" for value in values) for sweep, values in perceptrons.SWEEPS.items()}
    times, (least, *_, largest) = activations.RATE_STEPS, activations.RATES
    written = {
        **dict.fromkeys(("S1.3", "S1.4"), f"last {circles.LAST} epochs"),
        **dict.fromkeys(("S1.6", "S1.7", "S2.11", "S3.6", "A.2", "A.3", "A.6"), small),
        "S2.5": sweeps["init_scale"],
        "S2.6": sweeps["learning_rate"],
        "S2.10": f"batches of {perceptrons.BATCH_SIZES[-1]} give",
        "S3.4": f"{times} steps at 5 and at 30 times the largest rate of {least:g} to {largest:g}",
        "S3.5": f"kernels of deviation {activations.GRID['deviation'][0]:g}",
        "S3.5 (saturated)": f"kernels of deviation {activations.GRID['deviation'][-1]:g}",
        "S5.6": f"values of deviation {cifar.DEVIATION:g}",
        "S6.8": f"of the rates {', '.join(f'{rate:g}' for rate in vgg.RATES)},",
        "S1.9 (population)": f"batches of {recurrent.POPULATION_BATCH} examples",
    }
    for name, text in written.items():
        assert text in claims[name].rule, name
    assert f"ε = {recurrent.EPSILON:g}" in claims["S1.9 (population)"].statement
    assert claims["S3.1"].needs["steps"] == AtLeast(activations.STEPS["cpu"])


TEXT = """
[[sources]]
name = "a source"
needs = {epochs = 7, steps = {at_least = 10}}
[[sources.claims]]
id = "X.1"
statement = "a statement"
rule = "a rule"
conditions = [{label = "with", metric = "m", variant = "a", minus = "b", low = 0, digits = "auto"}]
[[sources.claims]]
id = "X.2"
statement = "another"
rule = "the same"
published = "1"
needs = {}
conditions = [{label = "with", metric = "m", variant = "a", low = 1, high = 1, one_run = true}]
"""


def test_claims_are_read_from_the_module_or_from_the_file_beside_it(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "some.toml").write_text(TEXT)
    first, second = read_claims(str(tmp_path / "some.py"))
    assert (first, second) == read_claims("anywhere.py", TEXT)
    condition = Condition("with", "m", "a", "b", low=0, digits=None)
    needs = {"epochs": 7, "steps": AtLeast(10)}
    assert first == Claim("X.1", "a source", "a statement", "–", "a rule", (condition,), needs)
    assert second.needs == {} and second.published == "1" and second.conditions[0].one_run


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("needs = {epochs", "need = {epochs", "some.toml, source 1: need is not a field; expected name, claims, needs"),
        ('id = "X.1"', "id = 1", "some.toml, claim 1: id must be of type str, got 1"),
        ('id = "X.1"\n', "", "some.toml, a claim of a source: id is missing"),
        ('id = "X.2"', 'id = "X.1"', "some.toml, claim X.1: id must be that of one claim only"),
        ('rule = "a rule"\n', "", "some.toml, claim X.1: rule is missing"),
        ('label = "with", metric = "m", variant = "a", m', "m", "some.toml, claim X.1, condition 1: label is missing"),
        ("low = 0", "low = true", "some.toml, claim X.1, condition 1: low must be of type float, got True"),
        (
            "low = 0, ",
            "",
            "some.toml, claim X.1, condition 1: low and high must be the ends of a range, got -inf and inf",
        ),
        ("low = 1", "low = 0", "some.toml, claim X.2, condition 1: low and high must both be the published number"),
        ("at_least", "least", "some.toml, claim X.1, needs.steps: least is not a field; expected at_least"),
        ('digits = "auto"', 'digits = "all"', "condition 1: digits must be of type int | None, got 'all'"),
        ("[[sources]]", "[[sources", "some.toml: "),
    ],
)
def test_faulty_claims_name_file_claim_and_field(tmp_path, old, new, message):
    (tmp_path / "claims").mkdir()
    assert old in TEXT
    (tmp_path / "claims" / "some.toml").write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_claims(str(tmp_path / "some.py"))


def save_run(directory, study, options, values=(0.84, 0.841), settings=None):
    """A `results.json` with two variants of the circles."""
    metrics = {"after": values, "none": (*values[:-1], np.nan)}
    variants = {name: (name, {}, {"test_accuracy": np.array(of)}) for name, of in metrics.items()}
    seeds, given = range(len(values)), options.to_json() | {"seeds": len(values)}
    results = Results(study, settings or {"epochs": 100}, seeds, variants, options=given)
    save(results, {}, directory, 1.0, datetime.datetime.now(datetime.UTC))


def test_ledger_runs_what_is_missing_only(tmp_path, monkeypatch):
    ran = []

    def run_study(study, options, directory, quiet, *, resume=False, force=False):
        if study.name == "mnist":
            raise DataError("no network")
        ran.append(study.name)
        save_run(directory, study.name, options)

    monkeypatch.setattr(console, "run_study", run_study)
    names = ["circles", "mnist", "cifar"]
    ledger = console.print_ledger(names, 2, True, tmp_path, None, True)
    assert ran == ["circles"] and ledger.seeds == {"circles": 2}
    by_id = {judgment.claim.id: judgment for judgment in ledger.judgments}
    assert "not measured" not in by_id["S1.1"].measured and by_id["S1.1"].verdict == "undecided"
    assert by_id["S2.1"].measured == "not run: no network" and by_id["S5.1"].measured == "left out by --fast"
    again = console.print_ledger(names, 2, True, tmp_path, None, True)
    assert ran == ["circles"] and again.rows() == ledger.rows()
    document = json.loads((tmp_path / "ledger.json").read_text())
    assert [entry["id"] for entry in document["claims"]] == list(by_id)
    page = (tmp_path / "ledger.md").read_text()
    assert page.count("\n| S") == len(by_id)
    amended = [id for id, judgment in by_id.items() if judgment.claim.amended]
    assert amended and all(f"- * {id}: " in page for id in amended) and page.count("* |") == len(amended)


@pytest.mark.parametrize(
    ("name", "found", "seeds", "fast", "is_run"),
    [
        ("circles", {"seeds": 2}, 2, False, False),
        ("circles", {"seeds": 2}, 3, False, True),
        ("circles", {"seeds": 3}, 2, False, False),
        ("circles", {"seeds": 2, "epochs": 500}, 3, False, False),  # the user's own; not replaced
        ("circles", {"seeds": 16}, 32, False, True),
        ("activations", {"seeds": 4, "steps": 2000}, 4, False, True),  # that of --fast
        ("activations", {"seeds": 4, "steps": 50_000}, 4, False, False),
        ("activations", {"seeds": 4}, 2, True, False),
        ("mnist", {"seeds": 3, "batch_sizes": (32, 128)}, 8, False, True),
    ],
)
def test_only_shorter_runs_are_replaced(tmp_path, monkeypatch, name, found, seeds, fast, is_run):
    assert STUDIES["activations"].fast["steps"] == 2000
    save_run(tmp_path / name, name, STUDIES[name].options(**found), (0.8, 0.9))
    ran = []
    monkeypatch.setattr(console, "run_study", lambda *arguments, **options: ran.append(arguments))
    console.print_ledger([name], seeds, fast, tmp_path, None, True)
    assert bool(ran) == is_run


def test_a_claim_is_judged_by_the_run_that_decides_it(tmp_path, monkeypatch):
    options = Options(seeds=3)
    save_run(tmp_path / "circles", "circles", options, (0.84, 0.841, 0.842), settings={"epochs": 5})
    save_run(tmp_path / "circles_longer", "circles", STUDIES["circles"].options(3, epochs=100), (0.84, 0.841, 0.839))
    save_run(tmp_path / "another", "blobs", options)
    runs, unreadable = saved_runs(tmp_path)
    assert not unreadable
    assert list(runs) == ["circles", "blobs"] and [path.name for path in runs["circles"]] == [
        "circles",
        "circles_longer",
    ]
    document = json.loads((tmp_path / "circles_longer" / "results.json").read_text())
    document["variants"]["none"] = document["variants"]["after"]
    (tmp_path / "circles_longer" / "results.json").write_text(json.dumps(document))
    monkeypatch.setattr(console, "run_study", pytest.fail)
    ledger = console.print_ledger(["circles"], 3, False, tmp_path, None, True)
    by_id = {judgment.claim.id: judgment for judgment in ledger.judgments}
    assert by_id["S1.1"].verdict == "reproduced"
    assert by_id["S1.5"].measured == "needs epochs 100"  # neither decides it; the first says why


@pytest.mark.parametrize(
    ("has_results", "is_older", "expected"),
    [
        (False, False, [(True, False)]),
        (True, False, [(True, True)]),
        (True, True, [(True, True), (False, True)]),  # the checkpoints are those of the finished run
    ],
)
def test_an_unfinished_run_of_other_options_is_kept_and_left_out(
    tmp_path, monkeypatch, capsys, has_results, is_older, expected
):
    from bnjax.training.checkpoint import CheckpointError

    folder = tmp_path / "circles"
    (folder / "checkpoints" / "after-0" / "7").mkdir(parents=True)
    if has_results:
        save_run(folder, "circles", STUDIES["circles"].options(seeds=2))
        offset = -10 if is_older else 10
        now = (folder / "results.json").stat().st_mtime + offset
        os.utime(folder / "checkpoints" / "after-0" / "7", (now, now))
    begun = []

    def run_study(study, options, out, quiet, *, resume=False, force=False):
        begun.append((resume, force))
        if resume:
            raise CheckpointError("of another configuration.")
        save_run(out, study.name, options, (0.84, 0.841, 0.842))

    monkeypatch.setattr(console, "run_study", run_study)
    judged = console.print_ledger(["circles"], 3, False, tmp_path, None, False)
    assert begun == expected
    printed = capsys.readouterr().out
    assert ("circles: of another configuration." in printed) == (len(expected) == 1)
    assert "- * S1.11: added after" in printed
    if not has_results:
        assert {judgment.reason for judgment in judged.judgments} == {"not run: of another configuration."}


@pytest.mark.parametrize(
    ("study", "options", "command"),
    [
        ("circles", STUDIES["circles"].options(), "bnjax run circles"),
        (
            "mnist",
            mnist.Options(3, batch_sizes=(2, 4), epochs=7),
            "bnjax run mnist --seeds 3 --epochs 7 --batch-sizes 2,4",
        ),
        ("smoothness", smoothness.Options(3, augment=True, data_dir="somewhere"), "bnjax run smoothness --augment"),
        (
            "cifar",
            cifar.Options(3, dataset="cifar10", group_size=2, data_dir="somewhere", devices=4),
            "bnjax run cifar --dataset cifar10 --group-size 2",
        ),
    ],
)
def test_the_command_that_makes_a_run_again(study, options, command):
    assert Results(study, {}, range(3), options=options.to_json()).command == command
