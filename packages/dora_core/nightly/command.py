"""``dora nightly``: run every pipeline's ``nightly.yaml``, compare with the history, write the report."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from dora_core.engine.peers import EXIT_STOPPED
from dora_core.evaluation.results import replace_file
from dora_core.nightly.golden import find_golden, with_distance, write_golden
from dora_core.nightly.history import History
from dora_core.nightly.judge import judge_night
from dora_core.nightly.measure import Measured, MeasurementError, measure_run
from dora_core.nightly.night import EntryResult, InterruptedNightError, Night, Start, now, run_entry
from dora_core.nightly.page import html_page
from dora_core.nightly.plan import Planned, find_plan, select
from dora_core.nightly.propose import propose
from dora_core.nightly.rows import Row
from dora_core.nightly.texts import exit_status, jsonl, junit, markdown, number, summary, value_text

DESCRIPTION = """\
Runs every entry of every pipeline's nightly.yaml in a process of its own, compares each metric with the history and
writes report.html, report.md, results.jsonl and junit.xml into --output. The same command with the same --output goes
on with a night that was interrupted. Exit status: 0 green, yellow or not run; 1 red; 3 something broke; 75 stopped.
"""
EXIT_BROKEN = 3


def main(arguments: Sequence[str]) -> None:
    """Run a night, or do what ``--list`` or ``--propose`` says; leaves by ``SystemExit`` unless the status is 0."""
    parser = argparse.ArgumentParser(
        prog="dora nightly",
        allow_abbrev=False,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="PIPELINE[/ENTRY]", help="run these entries; the others are grey")
    parser.add_argument("--history", type=Path, default=Path("runs/nightly/history.sqlite"), help="made if not there")
    parser.add_argument("--output", type=Path, help="folder of the night; runs/nightly/<time> if not given")
    parser.add_argument("--list", action="store_true", help="print the entries and end")
    parser.add_argument("--propose", action="store_true", help="print the diff that accepts the newest night, and end")
    own = parser.parse_args(arguments)
    planned = find_plan()
    chosen = select(planned, own.only)
    if own.list:
        for each in chosen:
            print(f"{each.name:<24} {each.entry.time_limit_s:>6g} s at most  {each.reproduce()}")
        return
    history = History(own.history)
    if own.propose:
        print(
            propose(history, chosen) or "Nothing to propose: no metric of the newest night is red or yellow.\n", end=""
        )
        return
    night = Night(own.output or own.history.parent / now()[:19].replace(":", ""), own.only)
    status = run_night(night, history, planned, chosen)
    if status:
        raise SystemExit(status)


def run_night(
    night: Night, history: History, planned: Sequence[Planned], chosen: Sequence[Planned], start: Start = run_entry
) -> int:
    """Run what of ``chosen`` has not ended, judge, write the reports and return the exit status.

    ``start`` runs one entry. Entries of ``planned`` that are not chosen are reported as not run.
    """
    try:
        measured: dict[str, Measured] = {}
        broken: dict[str, str] = {}
        for place, each in enumerate(chosen, 1):
            result = night.result(each) or _run(night, each, start, f"[{place}/{len(chosen)}] {each.name}")
            found, problem = _measure(night, history, each, result)
            if found is None:
                broken[each.name] = f"{problem}; its log is {night.log(each).relative_to(night.folder)}"
            else:
                measured[each.name] = found
            night.record(each, result)
        rows = judge_night(history, night.name, planned, measured, broken)
        for each in chosen:
            if each.name in measured:
                write_golden(night.folder, each, measured[each.name])
        _write_reports(night, rows)
        night.finish()
    except (KeyboardInterrupt, InterruptedNightError):
        print(f"stopped; go on with the same command and --output {night.folder}", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except Exception:
        traceback.print_exc()
        print(f"the nightly itself broke; go on with --output {night.folder}", file=sys.stderr, flush=True)
        return EXIT_BROKEN
    finally:
        night.close()
        history.close()
    return exit_status(rows)


def _run(night: Night, planned: Planned, start: Start, title: str) -> EntryResult:
    print(f"{title}: ", end="", flush=True)
    result = start(night, planned)
    print(f"{result.problem or 'finished'}, {result.seconds:.0f} s", flush=True)
    return result


def _measure(
    night: Night, history: History, planned: Planned, result: EntryResult
) -> tuple[Measured | None, str | None]:
    """Return an ended entry's measurements, which are then in the history; or why there are none."""
    if result.problem is not None:
        return None, result.problem
    try:
        measured = measure_run(night.run_folder(planned))
    except MeasurementError as error:
        return None, str(error)
    measured = with_distance(find_golden(history, night.name, planned, measured), measured)
    history.add_run(night.name, result.time, planned.pipeline, planned.entry.name, measured)
    return measured, None


def _write_reports(night: Night, rows: Sequence[Row]) -> None:
    """Write the four reports, each in one step, and print what is not green."""
    writers = {"results.jsonl": jsonl, "junit.xml": junit, "report.md": markdown, "report.html": html_page}
    for name, write in writers.items():
        replace_file(night.folder / name, [write(rows, night.name)])
    for row in rows:
        if row.verdict != "green":
            print(
                f"{row.verdict:<7} {row.planned.name} {row.metric}: {value_text(row)}, reference "
                f"{number(row.reference)}; {row.reason}"
            )
    print(f"{summary(rows)}. The report is {night.folder / 'report.html'}", flush=True)
