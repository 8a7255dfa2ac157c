"""A store's callers in short words, and a clock that tests move."""

from pipeline.serve.database import NewJob

LEASE_S = 10.0


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def new_job(owner="", key=None, body="body", model="toy", **changes):
    fields = {"owner": owner, "idempotency_key": key, "body_hash": body, "model": model, "request": {"seed": 1}}
    return NewJob(**(fields | {"seconds": "1", "fps": 8.0, "steps_total": 4} | changes))


def submit(store, num_jobs=1, **fields):
    return [store.submit(new_job(**fields), max_queue=1000)[0] for _ in range(num_jobs)]


def claim(store, worker="w", max_attempts=3):
    return store.claim(worker, "toy", LEASE_S, max_attempts)
