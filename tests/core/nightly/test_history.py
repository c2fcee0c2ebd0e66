"""The SQLite file: schema, provenance, who is compared with whom, several processes."""

from __future__ import annotations

import multiprocessing
import sqlite3
from dataclasses import replace

import pytest

from dora_core.nightly.history import PENDING, History
from dora_core.nightly.schema import SCHEMA_VERSION, HistoryError


def add(history, run, night, verdict="green"):
    history.add_run(night, f"{night}T03:00:00", "toy", "tiny", run)
    if verdict != PENDING:
        history.set_verdicts(night, "toy", "tiny", verdict, {each.metric: (verdict, "") for each in run.measurements})


def test_each_row_has_its_provenance(history, measured, measurement, tmp_path):
    add(history, measured(measurement(outcomes=[1, 0])), "2026-01-01")
    database = sqlite3.connect(tmp_path / "history.sqlite")
    assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    row = database.execute(
        "SELECT commit_hash, hardware, versions, config_hash, data_hash, verdict FROM measurements"
    ).fetchone()
    assert row[0] == "c" * 40 and row[1] == "a processor, 2 CPUs, 1 ranks" and '"torch": "2.14.1"' in row[2]
    assert row[3] == "f" * 64 and row[4] == "d" * 64 + "+e" and row[5] == "green"


def test_nothing_is_compared_across_hardware_data_entries_or_metrics(history, measured, measurement):
    one = measurement(0.5)
    add(history, measured(one), "2026-01-01")
    key = ("toy", "tiny", one.metric, "a processor, 2 CPUs, 1 ranks", one.data_hash)
    assert [past.value for past in history.past(*key, "2026-01-02")] == [0.5]
    for place in range(len(key)):
        other = [*key[:place], "another", *key[place + 1 :]]
        assert history.past(*other, "2026-01-02") == []
    assert history.past_runs("toy", "tiny", "another", "2026-01-02") == []


def test_pending_rows_are_kept_and_not_compared_with(history, measured, measurement, tmp_path):
    add(history, measured(measurement(0.5)), "2026-01-01", PENDING)
    key = ("toy", "tiny", "toy/quiz:accuracy", "a processor, 2 CPUs, 1 ranks", "d" * 64 + "+e")
    assert history.past(*key, "2026-01-02") == []
    assert history.past_runs(*key[:2], key[3], "2026-01-02") == []
    count = sqlite3.connect(tmp_path / "history.sqlite").execute("SELECT count(*) FROM measurements").fetchone()
    assert count == (1,)


def test_runs_that_were_red_are_no_reference(history, measured, measurement):
    add(history, measured(measurement(0.5)), "2026-01-01")
    add(history, measured(measurement(0.1), commit="b" * 40), "2026-01-02", "red")
    assert [run.night for run in history.past_runs("toy", "tiny", "a processor, 2 CPUs, 1 ranks", "x")] == [
        "2026-01-01"
    ]


def test_a_run_added_again_takes_the_place_of_the_first(history, measured, measurement):
    add(history, measured(measurement(0.5)), "2026-01-01")
    add(history, measured(measurement(0.7)), "2026-01-01")
    [past] = history.past("toy", "tiny", "toy/quiz:accuracy", "a processor, 2 CPUs, 1 ranks", "d" * 64 + "+e", "x")
    assert past.value == 0.7


def test_examples_come_back_as_they_went_in(history, measured, measurement):
    one = measurement(outcomes=[1, 0, 1])
    odd = replace(one.outcomes[0], question="\x00, <b>, 雪")
    one = replace(one, outcomes=[odd, *one.outcomes[1:]])
    add(history, measured(one), "2026-01-01")
    assert history.outcomes("2026-01-01", "toy", "tiny", one.metric) == one.outcomes
    assert history.outcomes("2026-01-02", "toy", "tiny", one.metric) == []


def test_another_schema_and_another_file_are_refused_and_left_alone(history, tmp_path):
    path = tmp_path / "newer.sqlite"
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=rf"has schema {SCHEMA_VERSION + 1}; this version reads and writes"):
        History(path)
    assert path.read_bytes() == before
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 30)
    with pytest.raises(HistoryError, match="cannot be read as a history"):
        History(tmp_path / "text")
    foreign = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign.execute("CREATE TABLE runs (x)")
    foreign.commit()
    with pytest.raises(HistoryError, match="has schema 0"):
        History(tmp_path / "foreign.sqlite")


def write_many(path, name, run):
    history = History(path)
    for place in range(10):
        history.add_run(f"{name}-{place}", f"2026-01-01T00:00:{place:02d}", "toy", "tiny", run)
        history.set_verdicts(f"{name}-{place}", "toy", "tiny", "green", {})
    history.close()


def test_several_processes_may_write_at_once(measured, measurement, tmp_path):
    context = multiprocessing.get_context("fork")
    path = tmp_path / "shared.sqlite"
    run = measured(measurement(0.5))
    processes = [context.Process(target=write_many, args=(path, name, run)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(History(path).past_runs("toy", "tiny", run.hardware, "")) == 40
