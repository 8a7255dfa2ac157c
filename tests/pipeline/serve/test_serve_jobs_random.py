"""The job store under random lives of jobs, against the rules of the state machine."""

import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from queue_helpers import LEASE_S, Clock, claim, submit

from pipeline.serve.database import ErrorCode, Status
from pipeline.serve.jobs import JobStore, LeaseLostError


class JobLife(RuleBasedStateMachine):
    """Random lives of jobs under a lying clock, against the rules of the state machine."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.store = JobStore(f"sqlite:///{self.folder.name}/jobs.sqlite", self.clock)
        self.claims, self.ends, self.fences, self.deleted, self.ids = [], {}, {}, set(), []

    @rule()
    def submit(self):
        self.ids += [job.id for job in submit(self.store)]

    @rule()
    def claim(self):
        job = claim(self.store)
        if job is not None:
            assert job.fence > self.fences.get(job.id, 0)
            assert job.id not in self.ends
            assert job.id not in self.deleted
            self.fences[job.id] = job.fence
            self.claims.append(job)

    @rule(wait_s=st.sampled_from([1.0, LEASE_S + 1]))
    def wait(self, wait_s):
        self.clock.now_s += wait_s

    @rule(data=st.data(), end=st.sampled_from(["complete", "fail", "progress", "release"]))
    def write(self, data, end):
        if not self.claims:
            return
        job = data.draw(st.sampled_from(self.claims))
        newest = self.fences[job.id] == job.fence and job.id not in self.ends and job.id not in self.deleted
        call = {
            "complete": lambda: self.store.complete(job, {}, 0),
            "fail": lambda: self.store.fail(job, ErrorCode.INTERNAL, "", 0),
            "progress": lambda: self.store.progress(job, 1, 4, LEASE_S),
            "release": lambda: self.store.release(job),
        }[end]
        try:
            call()
        except LeaseLostError:
            stored = self.store.get(job.id, "")
            assert not newest or stored.status == Status.FAILED  # by worker_lost, in a claim
        else:
            assert newest
            if end in ("complete", "fail"):
                self.ends[job.id] = Status.COMPLETED if end == "complete" else Status.FAILED

    @rule(data=st.data())
    def delete(self, data):
        if self.ids:
            job_id = data.draw(st.sampled_from(self.ids))
            assert (self.store.delete(job_id, "") is None) == (job_id in self.deleted)
            self.deleted.add(job_id)

    @invariant()
    def nothing_is_lost_and_ends_stay(self):
        jobs = {job.id: job for job in self.store.page("", None, 1000, False)[0]}
        assert list(jobs) == [job_id for job_id in self.ids if job_id not in self.deleted]
        for job_id, end in self.ends.items():
            if job_id in jobs:
                assert jobs[job_id].status == end

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


def test_any_life_keeps_the_rules():
    few = settings(max_examples=25, stateful_step_count=30, deadline=None, database=None)
    run_state_machine_as_test(JobLife, settings=few)
