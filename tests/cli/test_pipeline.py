"""Reading ahead of the model, and writing after it, in threads."""

import signal
import threading
import time

import pytest

from omniops.cli.pipeline import OrderedOutput, map_ahead


def test_results_ahead_come_in_order():
    def slow_at_first(number):
        time.sleep(0.02 if number == 0 else 0)
        return number * 10

    assert list(map_ahead(slow_at_first, range(20), threads=3)) == [number * 10 for number in range(20)]


def test_no_more_is_read_ahead_than_was_asked_for():
    taken = []
    results = map_ahead(str, (taken.append(number) or number for number in range(100)), threads=1, ahead=3)
    assert next(results) == "0"
    assert taken == [0, 1, 2, 3]
    results.close()


def test_an_error_ahead_is_raised_in_its_turn():
    def divide(number):
        return 6 / number

    results = map_ahead(divide, [3, 2, 0, 1], threads=2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_threads_work_side_by_side():
    both = threading.Barrier(2, timeout=20)
    assert len(list(map_ahead(lambda _: both.wait(), range(2), threads=2))) == 2


def test_output_is_consumed_in_order_by_one_thread():
    consumed, threads = [], set()

    def consume(number):
        consumed.append(number)
        threads.add(threading.get_ident())

    def prepare(number):
        time.sleep(0.01 * (number % 3 == 0))
        return number

    with OrderedOutput(prepare, consume, threads=4, waiting=4) as output:
        for number in range(20):
            output.add(number)
    assert consumed == list(range(20))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_add_waits_for_room():
    gate = threading.Event()
    added = []

    def add_all(output):
        for number in range(5):
            output.add(number)
            added.append(number)

    with OrderedOutput(lambda number: number, lambda _: gate.wait(20), threads=1, waiting=2) as output:
        thread = threading.Thread(target=add_all, args=(output,))
        thread.start()
        thread.join(0.2)
        assert added == [0, 1]
        gate.set()
        thread.join(20)
    assert added == list(range(5))


def test_what_was_added_is_consumed_after_an_interruption():
    consumed = []

    def prepare(number):
        time.sleep(0.02)
        return number

    def add_and_be_interrupted():
        with OrderedOutput(prepare, consumed.append, threads=1, waiting=9) as output:
            for number in range(5):
                output.add(number)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_and_be_interrupted()
    assert consumed == list(range(5))


@pytest.mark.parametrize("stage", ["prepare", "consume"])
def test_an_error_reaches_the_thread_that_adds_and_nothing_follows_it(stage):
    consumed = []

    def fail_at_2(number):
        if number == 2:
            raise OSError("the disk is full")
        return number

    def consume(number):
        consumed.append(fail_at_2(number) if stage == "consume" else number)

    prepare = fail_at_2 if stage == "prepare" else int

    def add_all():
        with OrderedOutput(prepare, consume, threads=2, waiting=2) as output:
            for number in range(100):
                output.add(number)

    with pytest.raises(OSError, match="disk is full"):
        add_all()
    assert consumed == [0, 1]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="of POSIX")
def test_a_signal_at_the_end_waits_until_all_is_consumed():
    """Whoever handles it closes the files that are written to."""
    consumed, entered, go_on = [], threading.Event(), threading.Event()

    def consume(item):
        entered.set()
        go_on.wait(10)
        consumed.append(item)

    def interrupt():
        entered.wait(10)
        time.sleep(0.1)  # until the main thread waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        go_on.set()

    output = OrderedOutput(lambda item: item, consume, 1, 2)
    output.add(1)
    output.add(2)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        output.close()
    assert consumed == [1, 2]
    thread.join()
