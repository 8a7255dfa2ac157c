"""The job store's promises: one winner a claim, no stale write, final ends, every job once in every listing."""

import threading
from collections import Counter

import pytest
from queue_helpers import LEASE_S, Clock, claim, new_job, submit

from pipeline.serve.database import ErrorCode, Status
from pipeline.serve.jobs import IdempotencyConflictError, JobStore, LeaseLostError, QueueFullError


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite", clock)
    yield store
    store.close()


def test_sqlite_is_durable(tmp_path, store):
    with store._engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    (job,) = submit(store)
    assert JobStore(f"sqlite:///{tmp_path}/jobs.sqlite").get(job.id, "") == job


def test_a_memory_database_is_refused():
    with pytest.raises(ValueError, match="database='sqlite://' must name a file"):
        JobStore("sqlite://")


def test_jobs_are_claimed_in_order_of_arrival(store):
    jobs = submit(store, 5)
    assert [job.queue_position for job in jobs] == [0, 1, 2, 3, 4]
    assert [claim(store).id for _ in jobs] == [job.id for job in jobs]
    assert claim(store) is None


def test_a_worker_takes_jobs_of_its_model_only(store):
    submit(store, model="other")
    (mine,) = submit(store)
    assert mine.queue_position == 0
    assert claim(store).id == mine.id
    assert claim(store) is None


def test_a_job_lives_from_queued_to_completed(store, clock):
    (job,) = submit(store)
    assert (job.status, job.attempt, job.created_at_s) == (Status.QUEUED, 0, 1000.0)
    held = claim(store)
    assert (held.status, held.attempt, held.lease_until_s) == (Status.IN_PROGRESS, 1, 1000.0 + LEASE_S)
    store.progress(held, 3, 4, LEASE_S)
    assert store.get(job.id, "").steps_done == 3
    clock.now_s += 5
    store.complete(held, {"video": {"url": "there"}}, keep_s=100)
    done = store.get(job.id, "")
    assert (done.status, done.steps_done, done.files) == (Status.COMPLETED, 4, {"video": {"url": "there"}})
    assert (done.completed_at_s, done.expires_at_s) == (1005.0, 1105.0)


def test_a_silent_worker_loses_its_job_and_can_write_no_more(store, clock):
    (job,) = submit(store)
    old = claim(store, "old")
    clock.now_s += LEASE_S + 1
    new = claim(store, "new")
    assert (new.id, new.attempt, new.fence, new.worker) == (job.id, 2, 2, "new")
    for write in (
        lambda: store.progress(old, 4, 4, LEASE_S),
        lambda: store.extend(old, LEASE_S),
        lambda: store.check(old),
        lambda: store.release(old),
        lambda: store.complete(old, {"video": {}}, 0),
        lambda: store.fail(old, ErrorCode.INTERNAL, "no", 0),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert store.get(job.id, "") == new


def test_every_sign_of_life_extends_the_lease(store, clock):
    submit(store)
    held = claim(store)
    for extend in (lambda: store.extend(held, LEASE_S), lambda: store.progress(held, 1, 4, LEASE_S)) * 3:
        clock.now_s += LEASE_S - 1
        extend()
        assert claim(store) is None


def test_a_job_that_loses_all_its_workers_fails(store, clock):
    (job,) = submit(store)
    for attempt in (1, 2):
        assert claim(store, max_attempts=2).attempt == attempt
        clock.now_s += LEASE_S + 1
    assert claim(store, max_attempts=2) is None
    lost = store.get(job.id, "")
    assert (lost.status, lost.error_code, lost.attempt) == (Status.FAILED, ErrorCode.WORKER_LOST, 2)


def test_a_released_job_is_taken_at_once_and_the_attempt_does_not_count(store):
    (job,) = submit(store)
    held = claim(store)
    store.release(held)
    again = claim(store)
    assert (again.id, again.attempt, again.fence) == (job.id, 1, 2)
    with pytest.raises(LeaseLostError):
        store.extend(held, LEASE_S)


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_an_end_is_final(store, clock, end):
    (job,) = submit(store)
    held = claim(store)
    if end == "complete":
        store.complete(held, {}, 0)
    else:
        store.fail(held, ErrorCode.INTERNAL, "broken", 0)
    final = store.get(job.id, "")
    clock.now_s += 10 * LEASE_S
    assert claim(store) is None
    for write in (
        lambda: store.progress(held, 1, 4, LEASE_S),
        lambda: store.complete(held, {"video": {}}, 0),
        lambda: store.fail(held, ErrorCode.INTERNAL, "again", 0),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert store.get(job.id, "") == final


def test_deleting_cancels_hides_and_leaves_a_tombstone(store, clock):
    (job,), running = submit(store), claim(store)
    other = submit(store, owner="somebody")[0]
    assert store.delete(other.id, "") is None
    assert store.delete(job.id, "").status == Status.IN_PROGRESS
    assert store.get(job.id, "") is None
    assert store.delete(job.id, "") is None
    with pytest.raises(LeaseLostError):
        store.check(running)
    assert store.expired(10) == []
    clock.now_s += 3601
    assert store.expired(10) == [job.id]
    store.forget(job.id)
    assert store.expired(10) == []


def test_an_idempotency_key_names_one_job_of_one_owner(store):
    first, is_new = store.submit(new_job(key="k"), 10)
    assert is_new
    assert store.submit(new_job(key="k"), 1) == (first, False)  # also where the queue is full
    with pytest.raises(IdempotencyConflictError):
        store.submit(new_job(key="k", body="another"), 10)
    assert store.submit(new_job(owner="somebody", key="k"), 10)[0].id != first.id
    store.delete(first.id, "")
    assert store.submit(new_job(key="k"), 10)[1]


def test_a_full_queue_takes_no_more(store):
    submit(store, 2)
    with pytest.raises(QueueFullError):
        store.submit(new_job(), max_queue=2)
    claim(store)
    store.submit(new_job(), max_queue=2)


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_show_every_job_once_while_jobs_come_and_go(store, newest_first):
    jobs = submit(store, 7)
    submit(store, 3, owner="somebody")
    ids = [job.id for job in (jobs[::-1] if newest_first else jobs)]
    seen, after = [], None
    while True:
        page, has_more = store.page("", after, 3, newest_first)
        seen += [job.id for job in page]
        if not has_more:
            break
        after = seen[-1]
        store.delete(after, "")  # the place of a deleted job is still known
        if newest_first:
            submit(store)
    assert seen == ids
    with pytest.raises(KeyError):
        store.page("somebody", ids[0], 3, newest_first)


def test_workers_are_counted_while_they_beat(store, clock):
    store.beat("a", "toy", forget_s=100)
    clock.now_s += 20
    store.beat("b", "toy", forget_s=100)
    store.beat("c", "other", forget_s=100)
    assert (store.num_workers("toy", 10), store.num_workers("toy", 30)) == (1, 2)
    store.leave("b")
    assert store.num_workers("toy", 10) == 0


def test_concurrent_claims_give_each_job_once(tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    store = JobStore(url)
    ids = {job.id for job in submit(store, 40)}
    claimed = []

    def work(name):
        own = JobStore(url)
        while (job := claim(own, name)) is not None:
            claimed.append((job.id, job.attempt))
            own.complete(job, {}, 0)
        own.close()

    run_threads(work, 4)
    assert Counter(claimed) == Counter((job_id, 1) for job_id in ids)


def test_concurrent_calls_with_one_key_make_one_job(tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    store, made = JobStore(url), []

    def call(name):
        made.extend(store.submit(new_job(key="k"), 10) for _ in range(5))

    run_threads(call, 6)
    assert len({job.id for job, _ in made}) == 1
    assert sum(is_new for _, is_new in made) == 1


def run_threads(target, num_threads):
    errors = []

    def guarded(name):
        try:
            target(name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f"w{i}",)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
