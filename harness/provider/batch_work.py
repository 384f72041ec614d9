"""A batch from the moment when its waiters are taken to its report, and the outcomes of its members.

Owner: `batcher.Batcher`, one at a time.

Spec: DESIGN 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from harness.errors import BatchFailed, GuestNotHere, HarnessError, NotReady
from harness.provider.batch import Answer, Outcome, Quote, SealedBatch, SharedAnswer, Waiter
from harness.provider.batching import BatchReport
from harness.provider.clock import Clock


@dataclass(slots=True, kw_only=True)
class BatchWork:
    """What is known of the batch in work; moments on the monotonic clock.

    Args:
        strategy: as in the settings.
        begun_s: when its waiters were taken.
        waited_s: how long the first of them had waited then.
        sealed_s: when the quoter was asked.
        ended_s: when it was done.
        members: requests with a leaf.
        refused: those taken without one.
        batch: None until it is sealed.
        tpm_quotes: TPM2_Quote commands of a quote that was made.
    """

    strategy: str
    begun_s: float
    waited_s: float
    sealed_s: float
    ended_s: float = 0.0
    members: int = 0
    refused: int = 0
    batch: SealedBatch | None = None
    tpm_quotes: int = 0
    _waits_s: list[float] = field(default_factory=list)

    def answers(self, batch: SealedBatch, quote: Quote, clock: Clock) -> Iterator[tuple[Waiter, Outcome]]:
        """Each member that is still there, with its answer; how long it waited is kept for the report."""
        shared = SharedAnswer(batch_id=batch.id, sealed_at=batch.sealed_at, quote=quote)
        for member in batch.members:
            if member.deliver is not None:
                self._waits_s.append(clock.monotonic() - member.arrived_s)
                yield member, Answer(shared=shared, proof=batch.proof(member))

    def report(self, outcome: str, waiting: int) -> BatchReport:
        """What the observer is told.

        Args:
            outcome: as in `BatchReport`.
            waiting: requests in the pools.
        """
        return BatchReport(
            batch_id=self.batch.id if self.batch else "",
            requests=self.members,
            refused=self.refused,
            tree_size=self.batch.tree.size if self.batch else 0,
            tpm_quotes=self.tpm_quotes,
            waited_s=self.waited_s,
            sealing_s=self.sealed_s - self.begun_s,
            quote_s=self.ended_s - self.sealed_s,
            waiting=waiting,
            outcome=outcome,
            strategy=self.strategy,
            waits_s=tuple(self._waits_s),
        )


def failures(batch: SealedBatch, cause: HarnessError) -> Iterator[tuple[Waiter, Outcome]]:
    """Each member with an error of its own: a shared one would gather everybody's traceback."""
    for member in batch.members:
        error = BatchFailed(f"the TPM made no quote: {cause.detail}", batch_id=batch.id)
        error.__cause__ = cause
        yield member, error


def absence(state: GuestNotHere | NotReady | None) -> HarnessError:
    """The error of one request whose guest gets no leaf; None: the residency check did not mention it."""
    if isinstance(state, NotReady):
        return NotReady(state.detail, retry_after_s=state.retry_after_s)
    return GuestNotHere("the guest does not run here now" if state is None else state.detail)
