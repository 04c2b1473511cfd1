"""Jobs in threads of their own: how many wait, how they end, and the threads that they share."""

import threading
import time

import pytest

from omniops.server.errors import Busy
from omniops.server.jobs import Budget, Cancelled, Jobs


def test_too_many_jobs_are_refused():
    jobs = Jobs(workers=1, waiting=2)
    go = threading.Event()
    begun = threading.Event()

    def work(progress):
        begun.set()
        go.wait()
        return 1

    first = jobs.start(work)
    begun.wait()
    others = [jobs.start(work) for _ in range(2)]
    with pytest.raises(Busy, match="too much to do"):
        jobs.start(work)
    go.set()
    assert [job.result() for job in (first, *others)] == [1, 1, 1]
    with pytest.raises(ZeroDivisionError):
        jobs.start(lambda progress: 1 / 0).result()
    assert jobs.start(lambda progress: 2).result() == 2


def test_the_end_of_the_server_ends_all_jobs():
    jobs = Jobs(workers=1)
    begun = threading.Event()

    def work(progress):
        begun.set()
        while True:
            progress.check()
            time.sleep(0.001)

    running, waiting = jobs.start(work), jobs.start(work)
    begun.wait()
    jobs.close()
    for job in (running, waiting):
        with pytest.raises(Cancelled):
            job.result()


def test_the_budget_of_threads_is_kept():
    budget = Budget(3)
    now, peak = 0, 0
    lock = threading.Lock()

    def work(wanted):
        nonlocal now, peak
        for _ in range(20):
            with budget.threads(wanted) as count:
                assert 1 <= count <= (wanted or 3)
                with lock:
                    now += count
                    peak = max(peak, now)
                time.sleep(0.0005)
                with lock:
                    now -= count

    threads = [threading.Thread(target=work, args=(wanted,)) for wanted in (1, 1, 2, 2, None, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (now, peak) == (0, 3)
