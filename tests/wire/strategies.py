"""Valid events of every kind, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from vmferry.wire.commands import (
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
    SwitchoverStart,
)
from vmferry.wire.configuration import Configuration

names = st.one_of(
    st.sampled_from(("pc.ram", "pc.rom", "a", "ü", "n" * 255)),
    st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=40).filter(
        lambda name: name.isprintable()
    ),
)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)

configurations = st.builds(
    Configuration,
    machine=names,
    page_bits=st.none() | st.integers(10, 16),
    capabilities=st.lists(names, max_size=4, unique=True).map(tuple),
    uuid=st.none() | st.uuids(),
)

_ranges = u64.flatmap(
    lambda start: st.tuples(st.just(start), st.integers(1, (1 << 64) - start))
).filter(lambda pair: pair[1] < 1 << 64)

commands = st.one_of(
    st.sampled_from(
        (
            OpenReturnPath(),
            PostcopyAdvise(),
            PostcopyListen(),
            PostcopyRun(),
            EnableColo(),
            PostcopyResume(),
            SwitchoverStart(),
        )
    ),
    st.builds(Ping, u32),
    st.builds(PostcopyAdvise, u64, u64),
    st.builds(RamDiscard, names, st.lists(_ranges, min_size=1, max_size=12).map(tuple)),
    st.builds(ReceivedBitmap, names),
    st.builds(Package, st.binary(min_size=1, max_size=600), st.just(9)),
)
