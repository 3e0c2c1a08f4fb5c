"""The promises of ``Image``, asked of every kind of storage in the same words."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.images.support import KINDS, SIZE, Kind, kind, noise, read
from vmferry.errors import ImageInactive, StorageError
from vmferry.images import Image

pytestmark = pytest.mark.qemu

_offsets = st.one_of(
    st.integers(0, SIZE), st.integers(0, SIZE // 512).map(lambda sector: sector * 512)
)
_lengths = st.one_of(
    st.integers(0, 9000), st.integers(0, 40).map(lambda s: s * 512), st.just(3 << 19)
)
_steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "durable", "zeroes", "zeroes kept", "discard", "read"]),
        _offsets,
        _lengths,
        st.integers(0, 3),
    ),
    max_size=12,
)


@pytest.mark.parametrize("name", KINDS)
def test_any_order_of_requests_is_as_on_an_array_of_bytes(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with kind(name, tmp_path_factory.mktemp("images")) as found, found.open(active=True) as image:

        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        @given(_steps)
        def check(steps: list[tuple[str, int, int, int]]) -> None:
            image.write_zeroes(0, SIZE)
            model = bytearray(SIZE)
            for number, (step, offset, length, parts) in enumerate(steps):
                _do(image, model, step, offset, min(length, SIZE - offset), parts, number)
            assert read(image) == model
            for extent in image.allocated():
                model[extent.offset : extent.end] = bytes(extent.length)
            assert not any(model), "there is data outside of what is allocated"

        check()


def _do(
    image: Image, model: bytearray, step: str, offset: int, length: int, parts: int, seed: int
) -> None:
    end = offset + length
    match step:
        case "write" | "durable":
            data = noise(seed, length)
            cuts = [length * part // (parts + 1) for part in range(parts + 2)]
            pieces = [data[a:b] for a, b in pairwise(cuts)]
            image.write(offset, *pieces, durable=step == "durable")
            model[offset:end] = data
        case "zeroes" | "zeroes kept":
            image.write_zeroes(offset, length, unmap=step == "zeroes")
            model[offset:end] = bytes(length)
        case "discard":  # what it leaves is open, so it is written over
            image.discard(offset, length)
            image.write_zeroes(offset, length)
            model[offset:end] = bytes(length)
        case "read":
            into = [bytearray(length // 3), bytearray(0), bytearray(length - length // 3)]
            image.read(offset, *into)
            assert b"".join(into) == model[offset:end]


def test_what_was_written_is_what_qemu_reads(any_kind: Kind) -> None:
    data = noise(1, 100_000)
    with any_kind.open(active=True) as image:
        assert image.size == SIZE
        image.write(70_000, data)
    expected = bytes(70_000) + data + bytes(SIZE - 170_000)
    assert any_kind.content() == expected


def test_buffers_of_numpy_and_thousands_of_them(any_kind: Kind) -> None:
    data = noise(2, 3000 * 7)
    with any_kind.open(active=True) as image:
        image.write(1001, *(data[at : at + 7] for at in range(0, len(data), 7)), b"")
        into = [bytearray(5) for _ in range(len(data) // 5)]
        image.read(1001, *into)
        assert b"".join(into) == data


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.write(0, b"x"),
        lambda image: image.discard(0, 512),
        lambda image: image.write_zeroes(0, 512),
        lambda image: image.resize(SIZE),
        lambda image: image.flush(),
    ],
    ids=["write", "discard", "write_zeroes", "resize", "flush"],
)
def test_inactive_image_cannot_be_changed(any_kind: Kind, change: Any) -> None:
    with any_kind.open(active=False) as image:
        before = any_kind.path.read_bytes(), any_kind.path.stat().st_mtime_ns
        assert not image.active
        assert image.size == SIZE
        with pytest.raises(ImageInactive, match="inactive on this side"):
            change(image)
    assert (any_kind.path.read_bytes(), any_kind.path.stat().st_mtime_ns) == before
    with pytest.raises(ImageInactive, match="closed"):
        change(image)


def test_inactive_image_is_read_only_where_nothing_is_cached(any_kind: Kind) -> None:
    with any_kind.open(active=True) as image:
        image.write(512, b"before")
        image.inactivate()
        if any_kind.options.get("direct") or any_kind.where.startswith("nbd"):
            assert read(image, 512, 6) == b"before"
            assert next(image.allocated()).offset <= 512
        else:
            with pytest.raises(ImageInactive):
                read(image, 512, 6)
            with pytest.raises(ImageInactive):
                next(image.allocated())


def test_activated_again_it_has_what_another_wrote(any_kind: Kind) -> None:
    with any_kind.open(active=True) as image, any_kind.open(active=False) as other:
        for turn in range(3):
            image.write(4096 * turn, noise(turn, 4096))
            image.inactivate()
            other.activate()
            assert read(other, 4096 * turn, 4096) == noise(turn, 4096)
            other.write(SIZE - 4096 * (turn + 1), noise(turn + 10, 4096))
            other.inactivate()
            image.activate()
            assert read(image, SIZE - 4096 * (turn + 1), 4096) == noise(turn + 10, 4096)


def test_both_states_are_idempotent(any_kind: Kind) -> None:
    image = any_kind.open(active=True)
    image.activate()
    assert image.active
    image.inactivate()
    image.inactivate()
    assert not image.active
    image.close()
    image.close()


@pytest.mark.parametrize("place", [(-1, 1), (SIZE, 1), (SIZE - 511, 512), (1 << 62, 1 << 62)])
def test_nothing_beyond_the_end(any_kind: Kind, place: tuple[int, int]) -> None:
    offset, length = place
    with any_kind.open(active=True) as image:
        for change in (image.discard, image.write_zeroes):
            with pytest.raises(StorageError, match="within its size"):
                change(offset, length)
        with pytest.raises(StorageError, match="within its size"):
            image.write(offset, bytes(min(length, 512)))
        with pytest.raises(StorageError, match="within its size"):
            image.read(offset, bytearray(min(length, 512)))


def test_read_only_image_is_never_written(any_kind: Kind) -> None:
    before = any_kind.path.read_bytes()
    with any_kind.open(active=True, read_only=True) as image:
        assert read(image, 0, 512) == bytes(512)
        for change in (image.discard, image.write_zeroes):
            with pytest.raises(StorageError, match="read-only"):
                change(0, 512)
        with pytest.raises(StorageError, match="read-only"):
            image.write(0, b"x")
        image.flush()
        image.inactivate()
    assert any_kind.path.read_bytes() == before


def test_threads_while_it_changes_state(any_kind: Kind) -> None:
    refused, errors = [], []
    with any_kind.open(active=True) as image:

        def work(number: int) -> None:
            mine = noise(number, 8192)
            for turn in range(30):
                at = 512 * (number * 100 + turn % 50)
                try:
                    image.write(at, mine)
                    if read(image, at, 512) != mine[:512]:
                        errors.append(f"{number} at {at}")
                except ImageInactive:
                    refused.append(turn)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            image.inactivate()
            image.activate()
        for thread in threads:
            thread.join()
    assert not errors


def test_missing_image_says_so(any_kind: Kind, tmp_path: Path) -> None:
    where = any_kind.where.replace("disk", "nothing")
    for active in (True, False):
        with pytest.raises(StorageError) as caught:
            Kind(where, tmp_path, any_kind.options).open(active=active)
        assert where in str(caught.value)
