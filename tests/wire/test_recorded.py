"""Streams of a real QEMU, read and written back byte for byte."""

from __future__ import annotations

import pytest

from tests.support.recorded import manifest, recorded
from tests.wire.feeding import pieces, read
from vmferry.errors import TruncatedStream
from vmferry.wire.multifd import MultifdReader
from vmferry.wire.ram import RamBlocks
from vmferry.wire.reader import StreamReader, Tolerate
from vmferry.wire.return_path import ReturnPathReader

# pc-postcopy-preempt has a second channel, of bare page records, that nothing here reads.
NAMES = list(manifest()["streams"])
MULTIFD = [name for name in NAMES if "multifd" in name]
ANSWERED = [name for name in NAMES if recorded(name)[0].answered]


def main(name):
    """The bytes of a main channel, and what makes readers for it."""
    tolerate = Tolerate.NO_END if "snapshot" in name else Tolerate.NOTHING
    return bytes(recorded(name)[0].sent), lambda: StreamReader(tolerate=tolerate)


@pytest.mark.parametrize("name", NAMES)
def test_stream_comes_back(name):
    data, make = main(name)
    whole = read(make(), [data], end=False)
    ends_with_its_channel = name == "pc-2.2"
    assert whole.finished != ends_with_its_channel
    whole = read(make(), [data])
    assert whole.error is None
    assert whole.written == data
    assert read(make(), pieces(data, len(data))).result() == whole.result()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pc-2.2"])
def test_stream_cut_short_is_refused_as_cut_off(name):
    data, make = main(name)
    for cut in range(1, len(data), len(data) // 7):
        assert isinstance(read(make(), [data[:-cut]]).error, TruncatedStream)


@pytest.mark.parametrize("name", MULTIFD)
def test_multifd_channels_come_back(name):
    main_channel, *others = recorded(name)
    (blocks,) = (e for e in StreamReader().feed(main_channel.sent) if isinstance(e, RamBlocks))
    known = {block.name: block for block in blocks.blocks}
    for channel in others:
        data = bytes(channel.sent)
        whole = read(MultifdReader(known), [data])
        assert whole.error is None
        assert whole.written == data
        assert read(MultifdReader(known), pieces(data, 5)).result() == whole.result()


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_come_back(name):
    data = bytes(recorded(name)[0].answered)
    outcome = read(ReturnPathReader(), [data])
    assert outcome.error is None
    assert outcome.written == data
    assert outcome.events[-1] == ("Shut", {"status": 0})
