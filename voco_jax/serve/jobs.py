"""Work that takes longer than a request may: it is begun, and asked about until it is done."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
import dataclasses
import logging
import secrets
import time

from voco_jax.errors import UserError
from voco_jax.serve.errors import ApiError
from voco_jax.serve.scheduler import Busy, Closed
from voco_jax.serve.store import Entry

log = logging.getLogger(__name__)

KEPT = 1000  # jobs that are remembered when they have ended, the newest
MOST = 64  # jobs of one owner that are there at once


@dataclasses.dataclass(eq=False)
class Job:
    """`done` of `total` images are compressed (0: not known yet); `memories` are those that are there already."""

    id: str
    owner: str
    created: int
    status: str = "running"  # or "done", "failed", "cancelled"
    done: int = 0
    total: int = 0
    memories: list[Entry] = dataclasses.field(default_factory=list)
    error: str = ""
    task: "asyncio.Task | None" = None

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total


class Jobs:
    """All jobs of a server. A restart forgets them; the memories that they made stay."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def start(self, owner: str, work: Callable[[Job], Awaitable[None]]) -> Job:
        """Begin; ApiError 429 where too many are there."""
        if sum(job.owner == owner and job.status == "running" for job in self._jobs.values()) >= MOST:
            raise ApiError(429, f"jobs: expected at most {MOST} at once", headers={"Retry-After": "10"})
        job = Job(f"job_{secrets.token_hex(12)}", owner, int(time.time()))
        self._jobs[job.id] = job
        while len(self._jobs) > KEPT:
            oldest = next((id for id, job in self._jobs.items() if job.status != "running"), None)
            if oldest is None:
                break
            del self._jobs[oldest]
        job.task = asyncio.create_task(self._run(job, work))
        return job

    def find(self, id: str, owner: str) -> Job:
        """ApiError 404 where there is none, or another's."""
        job = self._jobs.get(id)
        if job is None or job.owner != owner:
            raise ApiError(404, f"no job has the id {id[:100]!r}", code="job_not_found")
        return job

    async def close(self) -> None:
        """Cancel all, and wait until they have ended."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> None:
        try:
            await work(job)
            job.status = "done"
        except asyncio.CancelledError:
            job.status, job.error = "cancelled", "the job was cancelled"
        except (UserError, ApiError, Busy, Closed) as error:
            job.status, job.error = "failed", str(error)
        except Exception:
            log.exception("a job has failed")
            job.status, job.error = "failed", "the server could not do this"
