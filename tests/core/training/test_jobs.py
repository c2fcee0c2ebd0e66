"""Launches that run at once: their places, their results, and how all of them are stopped."""

import os
import signal
import threading
import time
from functools import partial

import pytest

from dora_core.training.jobs import run_jobs
from dora_core.training.launcher import launch


def test_places_are_shared_and_results_come_to_this_thread():
    running, most, threads, results = set(), [], set(), []
    lock = threading.Lock()

    def job(number, place, stop):
        with lock:
            assert place not in running
            running.add(place)
            most.append(len(running))
        time.sleep(0.05)
        with lock:
            running.remove(place)
        return number

    def done(number):
        threads.add(threading.current_thread())
        results.append(number)

    run_jobs([partial(job, number) for number in range(7)], 3, done)
    assert sorted(results) == list(range(7)) and max(most) == 3 and threads == {threading.main_thread()}
    run_jobs([partial(job, number) for number in range(3)], 1, done)
    assert results[7:] == [0, 1, 2]


def test_an_error_in_one_stops_the_others_and_begins_no_more():
    begun = []

    def fail(place, stop):
        begun.append("fail")
        raise ValueError("broken")

    def wait(place, stop):
        begun.append("wait")
        assert stop.asked.wait(30)
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="broken"):
        run_jobs([wait, fail, wait, wait, wait], 2, lambda _: None)
    assert len(begun) <= 3


@pytest.fixture
def run_until_told(tmp_path, chain, signals_of_a_terminal):
    """Run launches, two at a time, that take ``save_s`` to save, and send ``signals`` here once two are ready."""

    def run(num_jobs, save_s, signals):
        def job(number, place, stop):
            folder = tmp_path / str(number)
            folder.mkdir()
            return launch(chain(save_s, folder), folder / "log", stop=stop)

        def send():
            while len([*tmp_path.glob("*/ready")]) < 2:
                time.sleep(0.05)
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(1)

        sender = threading.Thread(target=send)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            run_jobs([partial(job, number) for number in range(num_jobs)], 2, lambda _: None)
        sender.join()

    return run


def test_a_signal_stops_all_launches_and_they_save(tmp_path, run_until_told):
    run_until_told(4, 0, [signal.SIGTERM])
    assert sorted(path.parent.name for path in tmp_path.glob("*/saved")) == ["0", "1"]
    assert not [*tmp_path.glob("[23]")]


def test_a_second_signal_does_not_wait_for_the_saving(tmp_path, run_until_told):
    started = time.monotonic()
    run_until_told(2, 500, [signal.SIGINT, signal.SIGINT])
    assert time.monotonic() - started < 60 and not [*tmp_path.glob("*/saved")]
