import datetime
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bnjax.studies import (
    STUDIES,
    Options,
    activations,
    cifar,
    circles,
    mnist,
    papers,
    perceptrons,
    recurrent,
    sensitivity,
    smoothness,
    vgg,
)
from bnjax.studies.cli import console
from bnjax.studies.data import DataError
from bnjax.studies.evidence.claims import AtLeast, Claim, judge, read_claims
from bnjax.studies.evidence.conditions import Condition
from bnjax.studies.evidence.ledger import Ledger, saved_runs
from bnjax.studies.evidence.results import Results, save
from bnjax.studies.evidence.statistics import holm, interval, p_of_mean, p_of_one_run, prediction_interval

DOCS = Path(__file__).parents[1] / "docs"


class Made:
    """Results made up: `{variant: {metric: values}}`."""

    def __init__(self, numbers, **settings):
        self.numbers, self.settings, self.examples = numbers, settings, {}
        self.seeds = range(len(next(iter(next(iter(numbers.values())).values()))))

    def values(self, variant, metric):
        values = self.numbers.get(variant, {}).get(metric)
        return None if values is None else np.array(values, float)


NUMBERS = {"a": [1.0, 2.0, 3.0], "b": [0.9, 2.1, 2.7], "c": [1.0, math.nan, 1.0], "d": [1.0, math.inf, 2.0]}
RECORD = Made({name: {"m": values} for name, values in (NUMBERS | {"e": [5.0] * 3}).items()}, epochs=7)


def cond(metric="m", variant="a", minus=None, **options):
    return Condition(label="it", metric=metric, variant=variant, minus=minus, **options)


def claim(*conditions, **options):
    words = {"id": "X", "source": "a source", "statement": "statement", "rule": "rule", "control": "c", "margin": "m"}
    return Claim(**words, conditions=conditions, **options)


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        (cond(low=-1, high=5), True),
        (cond(low=5), False),
        (cond(low=2), None),
        (cond(minus="b", low=-1, high=1), True),
        (cond(minus="b", low=0), None),
        (cond(variant="c", high=2), None),  # a seed lacks a value
        (cond(variant="nothing", high=2), None),
        (cond(metric="n", high=2), None),
        (cond(low=6, high=6, kind="one run"), True),
        (cond(low=11, high=11, kind="one run"), False),
        (cond(low=1.9, high=2.1, kind="exact"), True),
        (cond(low=2.1, kind="exact"), False),
        (cond(variant="d", low=0), None),  # not finite
        (cond(variant="e", low=4.9), True),  # the same at all seeds
        (cond(variant="e", low=5), None),
    ],
)
def test_conditions(condition, met):
    outcome = condition.judge(RECORD)
    assert outcome.met is met
    if condition.variant == "a" and condition.metric == "m" and condition.kind != "exact":
        values = np.array([1.0, 2.0, 3.0]) - (np.array([0.9, 2.1, 2.7]) if condition.minus else 0)
        assert outcome.measured == (prediction_interval if condition.kind == "one run" else interval)(values)
        if condition.minus:
            np.testing.assert_allclose(outcome.effect, values.mean() / values.std(ddof=1))


def test_a_quantity_beyond_that_of_its_control():
    record = Made({"a": {"m": [4.0, 5.0]}, "b": {"m": [1.0, 1.0]}, "c": {"m": [2.0, 2.5]}, "d": {"m": [1.0, 2.0]}})
    beyond = cond(minus="b", control="c", control_minus="d", low=0)
    np.testing.assert_array_equal(beyond.values(record), [3 - 1, 4 - 0.5])
    np.testing.assert_array_equal(cond(control="c", low=0).values(record), [2, 2.5])
    assert beyond.judge(record).effect > 0
    with pytest.raises(ValueError, match="control_minus must come with control"):
        cond(control_minus="d", low=0)


@pytest.mark.parametrize("bound", [0.2, 0.31])
def test_p_values_are_those_of_scipy(bound):
    values = np.array([0.1, 0.4, 0.35, 0.2])
    below, above = (stats.ttest_1samp(values, bound, alternative=side).pvalue for side in ("greater", "less"))
    np.testing.assert_allclose(p_of_mean(values, bound), np.minimum(1, [2 * below, 2 * above]), rtol=1e-10)
    # one further run lies within its prediction interval exactly where its p-value is above 5 %
    low, high = prediction_interval(values).low, prediction_interval(values).high
    np.testing.assert_allclose([p_of_one_run(values, end) for end in (low, high)], 0.05, rtol=1e-9)


def test_values_that_are_all_the_same_are_the_limit_of_values_that_are_nearly_so():
    same, nearly = np.full(5, 0.3), 0.3 + 1e-9 * np.arange(-2, 3)
    for bound in (0.2, 0.4):
        np.testing.assert_allclose(p_of_mean(same, bound), p_of_mean(nearly, bound), atol=1e-12)
    assert p_of_mean(same, 0.3) == (1, 1)


def test_a_record_that_was_written_and_read_is_judged_the_same():
    fresh = Made({"a": {"m": [np.inf, np.inf, np.inf]}, "b": {"m": [1.0, 1.2, 1.3]}})
    read = Made({"a": {"m": [np.nan, np.nan, np.nan]}, "b": {"m": [1.0, 1.2, 1.3]}})
    claims = [claim(cond(low=0)), claim(cond(variant="b", low=0))]
    of_both = [[(j.p_text, j.verdict, j.measured) for j in judge(claims, [record])] for record in (fresh, read)]
    assert of_both[0] == of_both[1] and of_both[0][0][0] == "–"


def test_an_interval_lies_in_a_range_exactly_where_its_p_value_says_so():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values, (low, high) = rng.normal(0, 1, 5), sorted(rng.normal(0, 2, 2))
        outcome = cond(low=low, high=high).judge(Made({"a": {"m": values.tolist()}}))
        measured = interval(values)
        inside, outside = measured.low > low and measured.high < high, measured.high < low or measured.low > high
        assert outcome.met is (True if inside else False if outside else None)
        assert (outcome.p_for < 0.05) == inside and (outcome.p_against < 0.05) == outside


def test_holm_keeps_the_chance_of_any_false_verdict():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.2]), [0.09, 0.04, 0.09, 0.2])
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(2000):
        p = [p_of_mean(rng.normal(0, 1, 5), 0.0) for _ in range(8)]
        wrong += any(value < 0.05 for value in holm([min(pair) for pair in p]))
    assert 0.03 < wrong / 2000 < 0.07  # without it a third


def test_verdicts():
    yes, no, unknown = (cond(low=low) for low in (-9, 19, 2))
    assert claim(yes, yes).judge(RECORD).verdict == "reproduced"
    assert claim(yes, unknown).judge(RECORD).verdict == "undecided"
    assert claim(unknown, no).judge(RECORD).verdict == "not reproduced"
    assert claim(cond(low=3, kind="exact"), is_arithmetic=True).judge(RECORD).verdict == "wrong in the source"
    assert claim(cond(low=3, kind="exact"), yes).judge(RECORD).verdict == "not reproduced"
    assert claim(cond(low=1, kind="exact")).judge(RECORD).verdict == "reproduced"
    assert claim(cond(low=1, kind="exact"), unknown).judge(RECORD).verdict == "undecided"
    assert claim(cond(low=5, high=5, kind="one run")).judge(RECORD).verdict == "compatible"
    assert claim(cond(low=50, high=50, kind="one run")).judge(RECORD).verdict == "not reproduced"
    assert claim(yes, needs={"epochs": 7}).judge(RECORD).verdict == "reproduced"
    other = claim(yes, needs={"epochs": 8, "dataset": "mnist"}).judge(RECORD)
    assert other.verdict == "undecided" and other.measured == "needs epochs 8, dataset mnist"
    flags = claim(yes, needs={"full_length": True, "augmented": False}).judge(RECORD)
    assert flags.measured == "needs full length, not augmented"
    assert claim(yes, needs={"epochs": AtLeast(7)}).judge(RECORD).verdict == "reproduced"
    longer = claim(yes, needs={"epochs": AtLeast(8), "steps": AtLeast(1000)}).judge(RECORD)
    assert longer.measured == "needs epochs of at least 8, steps of at least 1,000"


def test_a_claim_of_several_conditions_is_as_sure_as_the_least_sure_of_them():
    first, second, third = cond(low=-9), cond(low=-1), cond(low=9)
    single = [one.judge(RECORD).p_for for one in (first, second)]
    assert claim(first, second).judge(RECORD).p == max(single)
    against = third.judge(RECORD).p_against
    assert claim(first, third).judge(RECORD).p == 2 * against  # either may fail


def test_p_values_are_corrected_for_the_claims_that_are_tested():
    claims = [claim(cond(low=low)) for low in (-9, -1, 2)]
    claims += [claim(cond(low=1, kind="exact")), claim(cond(variant="zz", low=1)), claim(cond(low=0), needs={"x": 1})]
    judged = judge(claims, [RECORD])
    alone = [one.judge(RECORD).p for one in claims[:3]]
    np.testing.assert_allclose([j.corrected for j in judged[:3]], holm(alone))
    assert all(math.isnan(judged[i].corrected) for i in (3, 4, 5))
    assert judged[1].verdict == "undecided" and claims[1].judge(RECORD).verdict == "reproduced"
    assert judged[0].p_text == "0.003 → 0.008" and judged[3].p_text == "–"


def test_a_claim_is_judged_by_the_run_of_the_most_seeds_whatever_it_gave():
    few, many = (Made({"a": {"m": [1.0 + 0.01 * i for i in range(count)]}}, epochs=7) for count in (3, 5))
    other = Made({"a": {"m": [9.0 + 0.01 * i for i in range(9)]}}, epochs=6)
    (judged,) = judge([claim(cond(low=2), needs={"epochs": 7})], [few, other, many])
    assert judged.outcomes[0].measured.n == 5 and judged.verdict == "not reproduced"


def test_one_seed_decides_nothing():
    alone = Made({"a": {"m": [1.0]}})
    assert claim(cond(low=0)).judge(alone).verdict == "undecided"


def test_texts():
    judged = claim(cond(minus="b", low=0, digits=2), cond(variant="z", low=1)).judge(RECORD)
    assert judged.measured == "it 0.10 ± 0.50 (d_z +0.5); it not measured"
    difference = claim(cond(low=0, is_difference=True, digits=1)).judge(RECORD)
    assert difference.measured == "it 2.0 ± 2.5 (d_z +2.0)"
    run = claim(cond(low=2, high=2, kind="one run", digits=1, effect=0.5)).judge(RECORD)
    assert run.measured == "it 2.0 [-3.0, 7.0] (an interval 19.9 times as wide as the published effect, 0.5)"
    share = claim(cond(low=0, possible=(0, 3), digits=1)).judge(RECORD)
    assert share.measured == "it 2.0 [0.0, 3.0]"


def test_the_test_set_leaves_an_interval_of_its_own():
    record = Made({"a": {"m": [0.9, 0.92]}, "b": {"m": [0.8, 0.8]}})
    record.examples = {"m": 100}
    one, two = cond(low=0).judge(record), cond(minus="b", low=0).judge(record)
    half = 1.96 * np.sqrt([0.91 * 0.09 / 100, 0.8 * 0.2 / 100])
    np.testing.assert_allclose([one.test_set, two.test_set], [half[0], np.hypot(*half)])
    assert "test set ± 0.0561" in one.text


def test_every_claim_is_told_apart_and_complete():
    found = [one for study in STUDIES.values() for one in study.load().CLAIMS]
    ids = [one.id for one in found]
    assert len(ids) == len(set(ids)) >= 85
    for one in found:
        assert one.source and one.family in STUDIES and len(one.control) > 3 and len(one.margin) > 3
        assert all(figure.endswith(".png") for figure in one.figures)
        for condition in one.conditions:
            assert condition.low > -math.inf or condition.high < math.inf
            if condition.kind == "one run":
                assert condition.effect  # how wide the interval is against it


def test_every_old_row_has_a_successor():
    old = json.loads((DOCS / "results" / "first_ledger.json").read_text())
    found = [one for study in STUDIES.values() for one in study.load().CLAIMS]
    assert set(old) == {one.was or one.id for one in found} & set(old)
    assert {one.was for one in found if one.was} <= set(old)
    assert all(one.changed for one in found if (one.was or one.id) not in old)


def test_numbers_in_the_rules_are_those_of_the_studies():
    claims = {claim.id: claim for study in STUDIES.values() for claim in study.load().CLAIMS}
    small = f"trained on {sensitivity.SMALL_SET} images"
    sweeps = {sweep: ", ".join(f"{value:g}" for value in values) for sweep, values in perceptrons.SWEEPS.items()}
    times, (least, *_, largest) = activations.RATE_STEPS, activations.RATES
    learnt = f"half of chance's, {activations.LEARNT:.3f}"
    rates = ", ".join(f"{rate:g}" for rate in papers.RATES[:-1]) + f" and {papers.RATES[-1]:g}"
    written = {
        **dict.fromkeys(("S1.3", "S1.4"), f"last {circles.LAST} epochs"),
        **dict.fromkeys(("S1.6", "S1.7", "S3.6", "A.2", "A.3", "A.6", "S1.17", "L.1"), small.removeprefix("trained ")),
        "S2.5": sweeps["init_scale"],
        "S2.6": sweeps["learning_rate"],
        "S2.10": f"batches of {perceptrons.LARGEST} give",
        "S3.4": learnt,
        "S3.4 (tolerated)": f"{times} steps at 5 and at 30 times the largest rate of {least:g} to {largest:g}",
        "S3.5": f"kernels of deviation {activations.GRID['deviation'][-1]:g}",
        "S3.5 (small)": f"kernels of deviation {activations.GRID['deviation'][0]:g}",
        "S3.7": f"± {activations.LINEAR:g}",
        "S5.6": f"values of deviation {cifar.DEVIATION:g}",
        "S6.8": f"of the rates {', '.join(f'{rate:g}' for rate in vgg.RATES)},",
        "S1.9 (population)": f"batches of {recurrent.POPULATION_BATCH} examples",
        "B.1": f"rate, of {rates} and interpolated",
        "Y.1": f"{papers.DEPTH - 2 * papers.SKIPPED} middle layers of {papers.DEPTH}, of width {papers.SIZE}",
        "W.2": f"a decay of {papers.DECAY:g}",
        "H.1": f"batches of {papers.LARGE}, ghost batches of {papers.GHOST}",
        "H.2": f"batches of {papers.BATCH_SIZE}, ghost batches of {papers.GHOST}",
    }
    for name, text in written.items():
        assert text in claims[name].rule, name
    assert f"ε = {recurrent.EPSILON:g}" in claims["S1.9 (population)"].statement
    assert claims["S3.1"].needs["steps"] == AtLeast(STUDIES["activations"].fields["steps"].default)
    assert {c.high for c in claims["S3.4"].conditions if c.high < 9} == {round(activations.LEARNT, 3)}
    for study, setting, option in (("sensitivity", "examples", "steps"), ("papers", "steps", "steps")):
        needed = next(c.needs[setting].at_least for c in claims.values() if c.family == study and c.needs)
        assert needed == STUDIES[study].fields[option].default * (32 if study == "sensitivity" else 1)


TEXT = """
[[sources]]
name = "a source"
needs = {epochs = 7, steps = {at_least = 10}}
[[sources.claims]]
id = "X.1"
statement = "a statement"
rule = "a rule"
control = "none"
margin = "none"
conditions = [{label = "with", metric = "m", variant = "a", minus = "b", low = 0, digits = "auto"}]
[[sources.claims]]
id = "X.2"
statement = "another"
rule = "the same"
control = "none"
margin = "none"
published = "1"
needs = {}
conditions = [{label = "with", metric = "m", variant = "a", low = 1, high = 1, kind = "one run"}]
"""


def test_claims_are_read_from_the_module_or_from_the_file_beside_it(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "some.toml").write_text(TEXT)
    first, second = read_claims(str(tmp_path / "some.py"))
    assert (first, second) == read_claims("some.py", TEXT)
    assert first.family == "some" and first.source == "a source" and first.published == "–"
    assert first.conditions == (Condition(label="with", metric="m", variant="a", minus="b", low=0, digits="auto"),)
    assert first.needs == {"epochs": 7, "steps": AtLeast(10)}
    assert second.needs == {} and second.published == "1" and second.conditions[0].kind == "one run"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("needs = {epochs", "need = {epochs", "some.toml, sources[0]: object contains unknown field `need`"),
        ('id = "X.1"', "id = 1", "some.toml, claim 1, id: expected `str`, got `int`"),
        ('id = "X.1"\n', "", "some.toml, claim number 1: object missing required field `id`"),
        ('id = "X.2"', 'id = "X.1"', "some.toml, claim X.1: id must be that of one claim only"),
        ('rule = "a rule"\n', "", "some.toml, claim X.1: object missing required field `rule`"),
        ('label = "with", metric = "m", variant = "a", m', "m", "claim X.1, conditions[0]: object missing required"),
        ("low = 0", 'low = "a"', "some.toml, claim X.1, conditions[0].low: expected `float`, got `str`"),
        ("low = 0, ", "", "claim X.1, conditions[0]: low and high must be the ends of a range, got -inf and inf"),
        ("low = 1", "low = 0", "some.toml, claim X.2, conditions[0]: low and high must both be the published number"),
        ("at_least", "least", "some.toml, sources[0].needs"),
        ('digits = "auto"', 'digits = "all"', "conditions[0].digits: invalid enum value 'all'"),
        ('control = "none"\nmargin = "none"\nc', 'margin = "none"\nc', "missing required field `control`"),
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
    assert page.count("\n| ") == len(by_id) + 2


def test_what_was_changed_after_results_is_marked():
    judged = [claim(cond(low=0), amended=text).judge(RECORD) for text in ("", "because")]
    page = Ledger(judged, {"circles": 3}).markdown()
    assert page.count("* |") == 1 and page.endswith("- * X: because\n")


@pytest.mark.parametrize(
    ("name", "found", "seeds", "fast", "is_run"),
    [
        ("circles", {"seeds": 2}, 2, False, False),
        ("circles", {"seeds": 2}, 3, False, True),
        ("circles", {"seeds": 3}, 2, False, False),
        ("circles", {"seeds": 2, "epochs": 500}, 3, False, False),  # the user's own; not replaced
        ("circles", {"seeds": 16}, 32, False, True),
        ("activations", {"seeds": 4, "steps": 2000}, 4, False, True),  # that of --fast
        ("activations", {"seeds": 4, "steps": 60_000}, 4, False, False),
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


def test_saved_runs_of_one_study_are_judged_together(tmp_path, monkeypatch):
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
    assert by_id["S1.5"].measured == "after − before not measured"  # neither has it; the longer one has what it needs


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
        ("smoothness", smoothness.Options(5, augment=True, data_dir="somewhere"), "bnjax run smoothness --augment"),
        (
            "cifar",
            cifar.Options(5, dataset="cifar10", group_size=2, data_dir="somewhere", devices=4),
            "bnjax run cifar --dataset cifar10 --group-size 2",
        ),
    ],
)
def test_the_command_that_makes_a_run_again(study, options, command):
    assert Results(study, {}, range(3), options=options.to_json()).command == command
