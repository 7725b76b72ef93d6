"""Claims of shards: who has one, and when it is free again."""

from __future__ import annotations

import threading
import time

from vlv.jobs.shared.folders import open_folder
from vlv.jobs.shared.leases import Leases


class Clock:
    """Seconds that pass when told; no two machines agree on where they begin."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def watching(place: str, seconds: float = 60, start: float = 0) -> tuple[Leases, Clock]:
    clock = Clock(start)
    return Leases(open_folder(place), seconds, clock), clock


def test_one_worker_has_a_shard(place: str) -> None:
    (one, _), (two, _) = watching(place), watching(place, start=1e9)
    lease = one.claim(3, one.standing())
    assert lease is not None
    with lease:
        assert two.standing() == {3: 1}
        assert two.claim(3, {}) is None
        assert two.claim(3, two.standing()) is None
        assert lease.renew()
    assert two.standing() == {}
    assert two.claim(3, {}) is not None


def test_a_claim_that_stands_still_for_a_lease_is_free(place: str) -> None:
    (one, _), (two, clock), (three, late) = (
        watching(place),
        watching(place, start=-1e9),
        watching(place, start=1e9),
    )
    dead = one.claim(0, {})
    assert dead is not None
    standing = two.standing()
    assert two.claim(0, standing) is None, "just seen"
    clock.now += 59
    assert two.claim(0, standing) is None, "not long enough"
    assert dead.renew()
    clock.now += 59
    assert two.claim(0, standing) is None, "it has moved since"
    clock.now += 61
    heir = two.claim(0, standing)
    assert heir is not None
    assert two.standing() == {0: 2}
    assert three.claim(0, standing) is None
    late.now += 61
    assert three.claim(0, standing) is None, "two may not be free of the same claim"
    assert not dead.renew()
    assert dead.is_lost
    assert heir.renew()
    with heir:
        pass
    assert one.standing() == {}, "all claims of the shard are gone"


def test_a_worker_gives_signs_of_life(place: str) -> None:
    one, two = Leases(open_folder(place), 0.4), Leases(open_folder(place), 0.4)
    lease = one.claim(0, {})
    assert lease is not None
    with lease:
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert two.claim(0, {0: 1}) is None
            time.sleep(0.05)


def test_one_of_many_gets_it(place: str) -> None:
    folder, start = open_folder(place), threading.Barrier(8)
    taken = []

    def race() -> None:
        start.wait()
        claims = [(shard, Leases(folder, 60).claim(shard, {})) for shard in range(20)]
        taken.extend((shard, lease) for shard, lease in claims if lease is not None)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = [shard for shard, lease in taken if lease.renew()]
    assert sorted(kept) == list(range(20)), (
        "where two were told so, the first sign of life settles it"
    )
