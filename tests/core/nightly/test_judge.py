"""A night beside its history: verdicts, what changed, what is missing, pins."""

from __future__ import annotations

from dataclasses import replace

from dora_core.nightly.golden import Golden, find_golden, with_distance, write_golden
from dora_core.nightly.judge import judge_night
from dora_core.nightly.plan import Band

QUIZ = "toy/quiz:accuracy"
GOOD = [1] * 30 + [0] * 10
BAD = [0] * 12 + [1] * 18 + [0] * 10
HARDWARE = "a processor, 2 CPUs, 1 ranks"


def test_a_first_night_is_green_and_says_that_there_is_no_history(judge, planned, measured, measurement):
    rows = judge(planned(), measured(measurement(outcomes=GOOD)))
    assert {row.verdict for row in rows.values()} == {"green"}
    assert rows[QUIZ].reason == "no history"


def test_lost_answers_are_red_with_the_examples_that_flipped(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD)))
    row = judge(planned(), measured(measurement(outcomes=BAD)))[QUIZ]
    assert row.verdict == "red" and "McNemar" in row.reason
    assert [flip.index for flip in row.flips] == list(range(12)) and all(flip.worse for flip in row.flips)
    row = judge(planned(), measured(measurement(outcomes=BAD)))[QUIZ]
    assert row.verdict == "red"  # a red night is no reference
    assert [past.verdict for past in row.trend] == ["green", "red"]


def test_what_was_won_is_yellow(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=BAD)))
    assert judge(planned(), measured(measurement(outcomes=GOOD)))[QUIZ].verdict == "yellow"


def test_another_machine_begins_a_history_of_its_own(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD)))
    row = judge(planned(), measured(measurement(outcomes=BAD), hardware="another"))[QUIZ]
    assert (row.verdict, row.reason, row.trend) == ("green", "no history", ())


def test_changed_training_data_are_red_and_nothing_is_compared(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD)))
    cut = measured(measurement(outcomes=BAD, data="0" * 64), data_hash="0" * 64, num_rows=75)
    rows = judge(planned(), cut)
    assert rows["data"].verdict == "red" and "100 rows before, 75 now" in rows["data"].reason
    assert rows[QUIZ].verdict == "grey" and "not compared" in rows[QUIZ].reason
    assert judge(planned(), cut)["data"].verdict == "red"
    accepted = judge(planned(data=["0" * 12]), cut)
    assert accepted["data"].verdict == "green" and accepted[QUIZ].verdict == "green"


def test_data_that_changed_with_the_recipe_are_grey(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD)))
    config = {"train": {"lr": 0.001}, "data": {"num_validation": 5}}
    rows = judge(planned(), measured(measurement(outcomes=GOOD, data="0"), data_hash="0" * 64, config=config))
    assert rows["data"].verdict == "grey" and rows["data"].reason.startswith("data changed")
    assert "data.num_validation: None -> 5" in rows[QUIZ].notes


def test_changed_evaluation_rows_are_red_until_accepted(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD)))
    cut = measured(measurement(outcomes=GOOD[:20], evaluation="another_hash"))
    row = judge(planned(), cut)[QUIZ]
    assert row.verdict == "red" and "40 before, 20 now" in row.reason
    assert judge(planned(data=["another_hash"]), cut)[QUIZ].verdict == "grey"


def test_a_missing_metric_is_red_until_it_is_retired(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD), measurement(5.0, metric="toy/other:f1")))
    gone = measured(measurement(outcomes=GOOD))
    assert judge(planned(), gone)["toy/other:f1"].verdict == "red"
    assert "toy/other:f1" not in judge(planned(retired=["toy/other:f1"]), gone)


def test_a_score_without_a_standard_error_has_a_tenth_to_move_in(judge, planned, measured, measurement):
    bleu = {"metric": "toy/caption:bleu4"}
    judge(planned(), measured(measurement(0.5, **bleu)))
    assert judge(planned(), measured(measurement(0.46, **bleu)))["toy/caption:bleu4"].verdict == "green"
    assert judge(planned(), measured(measurement(0.4, **bleu)))["toy/caption:bleu4"].verdict == "red"


def test_a_band_of_what_is_not_measured_is_grey(judge, planned, measured, measurement):
    rows = judge(planned(bands={"peak_gib": Band()}), measured(measurement(outcomes=GOOD)))
    assert rows["peak_gib"].verdict == "grey"


def test_a_changed_recipe_is_compared_and_named(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD)))
    row = judge(planned(), measured(measurement(outcomes=BAD), config={"train": {"lr": 0.01}}))[QUIZ]
    assert row.verdict == "red" and row.notes == ("train.lr: 0.001 -> 0.01",)


def test_a_pin_that_was_moved_makes_the_red_night_the_reference(judge, planned, measured, measurement):
    judge(planned(), measured(measurement(outcomes=GOOD)))
    assert judge(planned(), measured(measurement(outcomes=BAD)))[QUIZ].verdict == "red"
    moved = planned(bands={QUIZ: Band(expected={HARDWARE: 18 / 40}, floor=0.05)})
    assert judge(moved, measured(measurement(outcomes=BAD)))[QUIZ].verdict == "green"


def test_tests_of_all_entries_are_one_family(history, planned, measured, measurement):
    """Seven lost answers of one task alone are red; among five tasks they are not."""
    before, now = [1] * 40, [0] * 7 + [1] * 33

    def verdicts(prefix: str, num_tasks: int) -> list[str]:
        entries = [planned(name=f"{prefix}{place}") for place in range(num_tasks)]
        runs = {each.name: measured(measurement(outcomes=before)) for each in entries}
        for each in entries:
            history.add_run(f"{prefix}1", "2026-01-01", "toy", each.entry.name, runs[each.name])
        judge_night(history, f"{prefix}1", entries, runs, {})
        runs = {
            each.name: measured(measurement(outcomes=before if place else now)) for place, each in enumerate(entries)
        }
        for each in entries:
            history.add_run(f"{prefix}2", "2026-01-02", "toy", each.entry.name, runs[each.name])
        rows = judge_night(history, f"{prefix}2", entries, runs, {})
        return [row.verdict for row in rows if row.metric == QUIZ]

    assert verdicts("a", 1) == ["red"]
    assert verdicts("b", 5) == ["green"] * 5


def test_rows_come_worst_first_and_broken_entries_before_all(history, planned, measured, measurement):
    entries = [planned(name=name) for name in ("good", "late", "lost")]
    rows = judge_night(
        history, "n", entries, {"toy/good": measured(measurement(outcomes=GOOD))}, {"toy/lost": "status 1"}
    )
    assert [(row.planned.entry.name, row.verdict) for row in rows] == [
        ("lost", "broken"), ("late", "grey"), ("good", "green"), ("good", "green"),
    ]  # fmt: skip


def test_the_golden_curve_is_the_oldest_good_one_unless_one_is_pinned(judge, history, planned, measured, tmp_path):
    first, entry = measured(), planned()
    assert find_golden(history, "x", entry, first) is None
    assert with_distance(None, first).measurements[0].value == 0
    assert with_distance(Golden(source="", curve=[(9, 1.0)]), first).measurements == []
    judge(entry, first)
    judge(entry, measured(curve=[(1, 2.02), (2, 1.5), (3, 1.0)]))
    golden = find_golden(history, "x", entry, first)
    assert golden.curve == first.curve and golden.source == "night 2026-01-01"
    assert find_golden(history, "x", entry, replace(first, hardware="another")) is None
    write_golden(tmp_path, entry, replace(first, curve=[(1, 3.0), (2, 3.0)]))
    pinned = tmp_path / "pipelines" / "toy" / "golden" / "tiny.json"
    pinned.parent.mkdir(parents=True)
    (tmp_path / "golden" / "toy" / "tiny.json").rename(pinned)
    golden = find_golden(history, "x", entry, first)
    assert golden.curve == [[1, 3.0], [2, 3.0]] and golden.source.startswith("golden/tiny.json")
    assert find_golden(history, "x", entry, replace(first, hardware="another")) is None
