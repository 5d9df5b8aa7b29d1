"""The thread that computes. HTTP runs in another one, and gives it jobs."""

from __future__ import annotations

import sys
import threading
import traceback

from secateur.serving.scheduler import Scheduler, ServingJob


class Worker:
    """Runs a scheduler in a thread of its own until it is stopped.

    Args:
        scheduler: computes the jobs.

    Attributes:
        failures: how often the engine raised an error. Each ends all jobs of that moment.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.failures = 0
        self.stopping = False
        self.woken = threading.Event()
        self.thread = threading.Thread(target=self.run, name="secateur-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are computed."""
        return self.thread.is_alive()

    def submit(self, *jobs: ServingJob) -> None:
        """Give it the jobs of a request, all or none.

        Raises:
            QueueFullError: too many wait, or it is stopping.
        """
        self.scheduler.submit(*jobs)
        self.woken.set()

    def cancel(self, job: ServingJob) -> None:
        """End a job that nobody wants any more; its slot is free after the step of this moment."""
        job.cancelled = True
        self.woken.set()

    def close(self) -> None:
        """Refuse new jobs and those that wait; those that run go on."""
        self.scheduler.close()
        self.woken.set()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread, after the jobs that run if they end in time.

        Returns:
            Whether all of them ended by themselves.
        """
        self.close()
        self.stopping = True
        self.woken.set()
        self.thread.join(timeout_seconds)
        return not self.thread.is_alive()

    def run(self) -> None:
        """Compute while there is something to compute, else wait for the next job."""
        while True:
            if self.scheduler.idle:
                if self.stopping:
                    return
                self.woken.wait()
                self.woken.clear()
                continue
            try:
                self.scheduler.step()
            except Exception:  # the jobs of this moment end with an error, and the server goes on
                traceback.print_exc(file=sys.stderr)
                self.failures += 1
                self.scheduler.fail()
