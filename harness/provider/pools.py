"""Open pools: which waiters may share a quote, which pool is served next, and whose turn it is. Pure; no task or clock.

Invariants:
    1. At each moment the union of a pool's selections lies inside the allowlist of every one of its members, so that
       every member may be handed every PCR that the quote covers.
    2. A waiter is in at most one pool; an empty pool is gone.
    3. The pool that waits longest is taken. A pool from which only a part was taken waits behind every pool that has
       not been served since; what comes later opens no pool that passes one that is open. So with k pools, each of
       which one quote serves, at most k - 1 of them go before a waiter's own.
    4. Where a pool is larger than what is taken from it, tenants take turns, each tenant's oldest first.
    5. A request whose like waits already is placed without looking at any pool; nothing here looks at all waiters but
       `Pools.take` and `Pools.waiters`.

Owner: `batcher.Batcher`.

Spec: DESIGN 3.4 (pools), 4 (order, fairness). A request joins the first pool, in the order of service, that may take
it: other placements that keep invariant 3 gave no fewer quotes worth the name (docs/adr/0004).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from harness.provider.batch import PendingQuote, Waiter
from harness.values import PCR_COUNT, HashAlg, PcrSelection

_BANKS = {bank: place * PCR_COUNT for place, bank in enumerate(HashAlg)}
_WIDTH = PCR_COUNT * len(_BANKS)
_ALL = (1 << _WIDTH) - 1


def kind_of(pending: PendingQuote) -> int:
    """The PCRs of all banks that a request asks for, and above them those that it may not see, as bits of one number.

    Requests of one kind may always share a quote.
    """
    asked = pending.request.mask << _BANKS[pending.request.bank]
    return asked | (_ALL & ~_bits(pending.allowlist)) << _WIDTH


def sees_what_it_asks(kind: int) -> bool:
    """Whether a request of this kind asks only for PCRs of its own allowlist."""
    return not kind & _ALL & kind >> _WIDTH


def _bits(selection: PcrSelection) -> int:
    bits = 0
    for bank, mask in selection.banks:
        bits |= mask << _BANKS[bank]
    return bits


class _Union:
    """Union of bit sets that come and go: counted, so that neither many sets nor many that left make it slow."""

    __slots__ = ("_counts", "bits")

    def __init__(self) -> None:
        self.bits = 0
        self._counts: dict[int, int] = {}

    def add(self, bits: int) -> None:
        self.bits |= bits
        for bit in _each(bits):
            self._counts[bit] = self._counts.get(bit, 0) + 1

    def discard(self, bits: int) -> None:
        for bit in _each(bits):
            self._counts[bit] -= 1
            if not self._counts[bit]:
                del self._counts[bit]
                self.bits ^= bit


def _each(bits: int) -> Iterator[int]:
    while bits:
        bit = bits & -bits
        yield bit
        bits ^= bit


class Pool:
    """Waiters that may share one quote.

    Args:
        opened_s: monotonic time.
    """

    __slots__ = ("_asked", "_denied", "_served_s", "_since_s", "_tenants", "kinds", "rank", "size")

    def __init__(self, opened_s: float) -> None:
        self._tenants: OrderedDict[str, OrderedDict[Waiter, None]] = OrderedDict()
        self._asked, self._denied = _Union(), _Union()
        self._since_s: float | None = opened_s  # None: the oldest has left
        self._served_s = float("-inf")
        self.kinds: dict[int, int] = {}
        self.size = 0
        self.rank = 0

    def __len__(self) -> int:
        return self.size

    def admits(self, kind: int) -> bool:
        """Whether the union with such a request lies inside the allowlist of every member and of the request."""
        return not (self._asked.bits | kind & _ALL) & (self._denied.bits | kind >> _WIDTH)

    def add(self, waiter: Waiter) -> None:
        """Puts a waiter whose kind it admits at the end of its tenant's queue."""
        tenant, kind = waiter.pending.tenant, waiter.kind
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._tenants[tenant] = OrderedDict()
        queue[waiter] = None
        count = self.kinds.get(kind, 0)
        if not count:
            self._asked.add(kind & _ALL)
            self._denied.add(kind >> _WIDTH)
        self.kinds[kind] = count + 1
        self.size += 1
        waiter.pool = self

    def discard(self, waiter: Waiter) -> None:
        """Takes a waiter out, if it is in this pool."""
        if waiter.pool is not self:
            return
        tenant = waiter.pending.tenant
        queue = self._tenants[tenant]
        del queue[waiter]
        if not queue:
            del self._tenants[tenant]
        self._forget(waiter)
        if waiter.arrived_s == self._since_s:
            self._since_s = None

    def _forget(self, waiter: Waiter) -> None:
        waiter.pool = None
        self.size -= 1
        self.kinds[waiter.kind] -= 1
        if not self.kinds[waiter.kind]:
            del self.kinds[waiter.kind]
            self._asked.discard(waiter.kind & _ALL)
            self._denied.discard(waiter.kind >> _WIDTH)

    def take(self, limit: int, now_s: float) -> list[Waiter]:
        """Takes up to ``limit`` waiters out: one of each tenant in turn, each tenant's oldest first."""
        if self.size <= limit:
            taken = list(self.waiters())
            for waiter in taken:
                waiter.pool = None
            self._tenants.clear()
            self.kinds.clear()
            self.size = 0
            return taken
        taken = []
        while len(taken) < limit:
            tenant, queue = next(iter(self._tenants.items()))
            waiter, _ = queue.popitem(last=False)
            if queue:
                self._tenants.move_to_end(tenant)
            else:
                del self._tenants[tenant]
            self._forget(waiter)
            taken.append(waiter)
        self._served_s, self._since_s = now_s, None
        return taken

    def turns(self, tenant: str, limit: int) -> int:
        """How many times it must be served until one more request of this tenant is answered, at the least."""
        own = len(self._tenants.get(tenant, ()))
        before = own + sum(min(len(queue), own) for other, queue in self._tenants.items() if other != tenant)
        return before // limit + 1

    def waiters(self) -> Iterator[Waiter]:
        """All of them, tenant by tenant."""
        return (waiter for queue in self._tenants.values() for waiter in queue)

    @property
    def waiting_since_s(self) -> float:
        """When its oldest waiter came, or when the pool was last served if that is later."""
        if self._since_s is None:
            self._since_s = min(next(iter(queue)).arrived_s for queue in self._tenants.values())
        return max(self._served_s, self._since_s)


class Pools:
    """The open pools, in the order of service.

    Args:
        most: bound on their number.
        together: False where nobody shares a quote: then all wait in one pool, whatever their allowlists, and no more
            than one is ever to be taken at a time.
    """

    def __init__(self, most: int, *, together: bool = True) -> None:
        self._most = most
        self._together = together
        self._order: list[Pool] = []
        self._homes: dict[int, Pool] = {}  # pool in which members of a kind wait
        self.waiting = 0

    def __len__(self) -> int:
        return len(self._order)

    def find(self, waiter: Waiter) -> Pool | None:
        """The pool that is to take it, perhaps a new one; None where that would be one too many."""
        if not self._together:
            waiter.kind = 0
        pool = self._homes.get(waiter.kind)
        if pool is None:
            self._sort()
            pool = next((pool for pool in self._order if pool.admits(waiter.kind)), None)
        if pool is None and len(self._order) < self._most:
            pool = Pool(waiter.arrived_s)
            pool.rank = len(self._order)
        return pool

    def ahead(self, pool: Pool, tenant: str, limit: int, *, at_least: bool) -> int:
        """How many quotes it takes until one more request of ``tenant`` in ``pool`` is answered, as things stand.

        Args:
            pool: as `find` gave it.
            tenant: whose request.
            limit: most that one quote serves.
            at_least: exact; without it an upper bound, which costs nothing.
        """
        turns = pool.turns(tenant, limit) if at_least and pool.size >= limit else pool.size // limit + 1
        return pool.rank + 1 + (turns - 1) * max(1, len(self._order))

    def add(self, pool: Pool, waiter: Waiter) -> None:
        """Puts a waiter into the pool that `find` gave for it."""
        if not pool.size:
            self._order.append(pool)
        pool.add(waiter)
        self._homes[waiter.kind] = pool
        self.waiting += 1

    def discard(self, waiter: Waiter) -> None:
        """Takes a waiter out, if it is in a pool."""
        pool = waiter.pool
        if pool is None:
            return
        pool.discard(waiter)
        self.waiting -= 1
        if waiter.kind not in pool.kinds:
            del self._homes[waiter.kind]
        if not pool.size:
            self._order.remove(pool)
            self._number()

    def take(self, limit: int, now_s: float) -> list[Waiter]:
        """Waiters of the pool that waits longest, up to ``limit``.

        Raises:
            IndexError: nobody waits.
        """
        self._sort()
        pool = self._order[0]
        kinds = list(pool.kinds)
        taken = pool.take(limit, now_s)
        self.waiting -= len(taken)
        for kind in kinds:
            if kind not in pool.kinds:
                del self._homes[kind]
        if not pool.size:
            del self._order[0]
        self._sort()
        return taken

    def batches(self, limit: int) -> int:
        """How many quotes it takes to answer all who wait."""
        return sum(-(-pool.size // limit) for pool in self._order)

    def waiters(self) -> list[Waiter]:
        """All who wait in a pool."""
        return [waiter for pool in self._order for waiter in pool.waiters()]

    def _sort(self) -> None:
        self._order.sort(key=lambda pool: pool.waiting_since_s)
        self._number()

    def _number(self) -> None:
        for rank, pool in enumerate(self._order):
            pool.rank = rank
