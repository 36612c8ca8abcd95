"""All kinds of faults, by name."""

from tests.faults.data_faults import (
    GarbageShards,
    RemovedShards,
    ServerDown,
    ServerDrops,
    ServerSendsHalf,
    ServerStalls,
    TruncatedShards,
)
from tests.faults.fault import Fault
from tests.faults.process_faults import (
    DiskFull,
    KillInSave,
    KillOneRank,
    KillRanks,
    PowerOff,
    StopRank,
    TermLauncher,
    TermRank,
)

KINDS: dict[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        KillRanks,
        KillOneRank,
        PowerOff,
        KillInSave,
        TermLauncher,
        TermRank,
        StopRank,
        DiskFull,
        TruncatedShards,
        GarbageShards,
        RemovedShards,
        ServerDrops,
        ServerStalls,
        ServerSendsHalf,
        ServerDown,
    )
}
