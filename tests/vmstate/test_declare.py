"""A wrong declaration is an error when the class is made, and names the class and the field."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass, field, make_dataclass
from types import ModuleType
from typing import Annotated, Any, ClassVar, NamedTuple

import pytest

from vmferry.errors import DeclarationError, UsageError
from vmferry.vmstate import (
    I8,
    I32,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bitmap,
    Buffer,
    Custom,
    Gap,
    Local,
    Queue,
    Subsection,
    Temporary,
    Timer,
    Tree,
    VarArray,
    VarBuffer,
    at_most,
    at_version,
    before,
    declared,
    device,
    equal,
    load,
    named,
    of,
    save,
    since,
    state,
    subsection,
    vmstate_of,
    when,
)
from vmferry.vmstate.types import Double, Expiry, Integer


@state("dev/inner", version=2)
@dataclass
class Inner:
    x: U8 = 0


@state("dev/other")
class Demanding:
    x: U8

    def __init__(self, bus: object) -> None:
        self.bus = bus


@state("other")
class Elsewhere:
    x: U8


class Undeclared:
    pass


WRONG: list[tuple[Any, str]] = [
    (int, "int does not say how it is sent; use a kind such as U32"),
    (str, "str does not say how it is sent"),
    (float, "float does not say how it is sent"),
    (Undeclared, "Undeclared does not say how it is sent"),
    (Inner | None, "Inner | None does not say how it is sent; use a subsection for a state that"),
    (list[U8], "list[U8] does not say how it is sent; use a kind such as Array(4)"),
    ("Annotated[U8, sinc(2)]", "its annotation cannot be read: name 'sinc' is not defined"),
    ("U8 U16", "its annotation cannot be read"),
    (Annotated[str, Integer(4)], "Integer of 1, 2, 4 or 8 is an int; found str"),
    (Annotated[int, Integer(3)], "Integer of 1, 2, 4 or 8 is an int"),
    (Annotated[int, Integer], "Integer lacks its arguments"),
    (Annotated[int, Integer("4")], "Integer: size is of type int; found '4'"),  # type: ignore[arg-type]
    (Annotated[U8, U16], "it has two types"),
    (Annotated[int, Double()], "Double is a float"),
    (Annotated[int, Expiry()], "a timer is an int | None"),
    (Annotated[U8, Integer(2)], "two kinds"),
    (Annotated[U8, since(4)], "since(4) in a class of version 3"),
    (Annotated[U8, before(4)], "before(4) in a class of version 3"),
    (Annotated[U8, since(2), before(2)], "before(2)"),
    (Annotated[U8, since(2), since(3)], "two conditions of the same sort"),
    (
        Annotated[U8, when(lambda: True)],
        "the test of when() takes the device, or it and the version",
    ),
    (Annotated[U8, named("a\nb")], "printable bytes"),
    (Annotated[U8, named("")], "printable bytes"),
    (Annotated[U8, since("2")], "Since: version is of type int; found '2'"),  # type: ignore[arg-type]
    (Annotated[bool, equal], "equal and at_most are for integers"),
    (Annotated[Timer, equal], "equal and at_most are for integers"),
    (Annotated[U32, at_most], "at_most is for I32"),
    (Annotated[U8, at_version(1)], "at_version is for structs"),
    (Annotated[Inner, at_version(1)], "Inner has versions 2 to 2, found 1"),
    (Annotated[str, Buffer(4)], "a buffer is bytes or bytearray"),
    (Annotated[bytes, Buffer(0)], "a size of 1"),
    (Annotated[str, Custom(Undeclared())], "a codec has a type, save and load"),  # type: ignore[arg-type]
    (Annotated[bytes, Buffer(4, of=8)], "a partial buffer is a bytearray"),
    (Annotated[bytearray, Buffer(4, 6, of=8)], "bytes within 8"),
    (Annotated[bytes, VarBuffer("n", 4)], "the count 'n' is no field declared before it"),
    (Annotated[bytes, VarBuffer("flag", 4)], "the count 'flag' is not a U8, U16, U32 or I32"),
    (Annotated[tuple[U8, ...], Array(4)], "an array is a list[...]"),
    (Annotated[list[U8], Array()], "a shape of positive numbers"),
    (Annotated[list[U8], Array("3")], "a shape of positive"),  # type: ignore[arg-type]
    (Annotated[list[U8], Array(-1)], "a shape of positive numbers"),
    (Annotated[list[U8], Array(2, 2)], "lists in lists, 2 deep"),
    (Annotated[list[int], Array(2)], "int does not say how it is sent"),
    (Annotated[list[Annotated[U8, since(2)]], Array(2)], "elements without conditions"),
    (Annotated[list[U8], VarArray("length", 4)], "the count 'length' is no field"),
    (Annotated[list[U8], VarArray("small", 4)], "the count 'small' is not a U8"),
    (Annotated[list[U8], VarArray("count", 0)], "a bound of 1"),
    (Annotated[list[U8], VarArray("count", 8, multiple=0)], "a multiple of at least 1"),
    (Annotated[list[Demanding], VarArray("count", 8)], "a Demanding has to be made when loading"),
    (Annotated[list[U8], Queue()], "is of a class declared with @state"),
    (Annotated[list[Demanding], Queue()], "a Demanding has to be made when loading"),
    (Annotated[dict[str, Inner], Tree()], "a key that is no int"),
    (Annotated[list[Inner], Tree()], "a tree is a dict[...]"),
    (Annotated[bytes, Bitmap(8)], "a bitmap is an int"),
    (Annotated[None, Gap(4)], "ClassVar[Annotated[...]] is for Gap"),
    (ClassVar[Annotated[None, Gap(0)]], "a gap has 1 to"),
    (ClassVar[U8], "ClassVar[Annotated[...]] is for Gap"),
    (ClassVar[Annotated[U8, of("nothing")]], "of('nothing') names no attribute"),
    (ClassVar[Annotated[int, Temporary("a", "b")]], "a temporary is of a class declared"),
    (ClassVar[Annotated[Inner, Temporary("make", "take")]], "make is a method of self"),
    (Annotated[Inner, subsection], "a subsection is either X | None, or Subsection(needed=...)"),
    (Annotated[Inner | None, Subsection(bool)], "a subsection is either X | None"),
    (Annotated[Elsewhere | None, subsection], "the name of a subsection begins with 'dev'"),
    (Annotated[Demanding | None, subsection], "a Demanding has to be made when loading"),
    (Annotated[U8 | None, subsection], "a subsection is of a class declared with @state"),
    (Annotated[Inner | None, subsection, since(2)], "a subsection is an attribute, without"),
    (Annotated[U8, Local[int].__metadata__[0]], "an attribute is local, or it is migrated"),  # type: ignore[attr-defined]
]


@pytest.mark.parametrize(("annotation", "message"), WRONG)
def test_wrong_fields_are_refused_by_name(annotation: Any, message: str) -> None:
    class Device:
        flag: bool
        small: I8
        count: U16

    Device.__annotations__["field"] = annotation
    with pytest.raises(DeclarationError, match=re.escape("Device.field: ")) as refused:
        device("dev", version=3)(Device)
    assert message in str(refused.value)


def plain() -> type[Any]:
    class Device:
        x: U8

    return Device


@pytest.mark.parametrize(
    ("decorator", "message"),
    [
        (lambda: device(""), "a name has 1 to 255 printable bytes"),
        (lambda: device("x" * 256), "a name has 1 to 255 printable bytes"),
        (lambda: device("d", version=1, minimum_version=2), "minimum_version <= version"),
        (lambda: device("d", version=2**32), "minimum_version <= version"),
        (lambda: device("d", instance_id=-1), "instance_id is 0 to"),
        (lambda: device("d", alias_id=2**32), "alias_id is 0 to"),
        (lambda: device("d", alias_id=1.5), "alias_id is 0 to"),  # type: ignore[arg-type]
        (lambda: device(plain()), "Device: @device is called with the name that"),  # type: ignore[arg-type]
        (lambda: device("d", version="1"), "<= 4294967295, found '1'"),  # type: ignore[arg-type]
        (lambda: device("d", priority="1"), "priority is a number"),  # type: ignore[arg-type]
        (lambda: device("d", unmigratable=True), "is the reason"),  # type: ignore[arg-type]
        (lambda: lambda cls: device("d")(cls.__init__), "expected a class"),
    ],
)
def test_wrong_devices_are_refused(decorator: Callable[[], Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=re.escape(message)):
        decorator()(plain())


def test_a_hook_of_another_shape_is_refused() -> None:
    class Device:
        x: U8

        def post_load(self) -> None:
            pass

    with pytest.raises(DeclarationError, match=r"Device\.post_load: a method of self and the ver"):
        device("d")(Device)


def test_a_list_that_all_objects_share_is_refused() -> None:
    class Device:
        x: Annotated[list[U8], Array(2)] = [0, 0]  # noqa: RUF012

    with pytest.raises(DeclarationError, match=r"Device\.x: its value in the class is shared"):
        device("d")(Device)


def test_a_frozen_class_is_refused() -> None:
    with pytest.raises(DeclarationError, match="Frozen: it is frozen"):
        device("d")(make_dataclass("Frozen", [("x", U8)], frozen=True))
    attrs = pytest.importorskip("attrs")
    with pytest.raises(DeclarationError, match="Frozen: it is frozen"):
        device("d")(attrs.make_class("Frozen", {"x": attrs.field(type=U8)}, frozen=True))
    with pytest.raises(DeclarationError, match="Tuple: it is frozen"):
        device("d")(Tuple)


class Tuple(NamedTuple):
    x: U8


class Slotted:
    __slots__ = ("y",)
    x: U8


class Computed:
    x: U8

    @property
    def x(self) -> int:  # type: ignore[no-redef]
        return 1


@pytest.mark.parametrize("cls", [Slotted, Computed])
def test_an_attribute_that_cannot_be_set_is_refused(cls: type[Any]) -> None:
    message = rf"{cls.__name__}\.x: objects of the class have no such attribute to set"
    with pytest.raises(DeclarationError, match=message):
        device("d")(cls)


def test_two_subsections_of_one_name_are_refused() -> None:
    class Device:
        first: Annotated[Inner | None, subsection]
        second: Annotated[Inner | None, subsection]

    with pytest.raises(DeclarationError, match=r"Device\.second: a second subsection called"):
        device("dev")(Device)


def test_names_that_do_not_exist_are_refused() -> None:
    class Device:
        x: Nowhere  # type: ignore[name-defined]  # noqa: F821

    message = r"Device\.x: its annotation cannot be read: name 'Nowhere' is not defined"
    with pytest.raises(DeclarationError, match=message):
        device("d")(Device)


def test_what_is_local_may_have_a_type_that_only_type_checkers_know() -> None:
    @device("d")
    class Device:
        bus: Local[Nowhere]  # type: ignore[name-defined]  # noqa: F821
        all: ClassVar[nowhere.Else[int] | None]  # type: ignore[name-defined]  # noqa: F821
        x: U8 = 1

    assert save(Device()) == b"\1"


def test_what_a_dataclass_only_takes_as_an_argument_is_no_field() -> None:
    @device("d")
    @dataclass
    class Device:
        start: InitVar[int]
        x: U8 = 0
        _: KW_ONLY
        y: U8 = 0

        def __post_init__(self, start: int) -> None:
            self.x = start

    loaded = Device(0)
    load(loaded, save(Device(3, y=4)), 1)
    assert (loaded.x, loaded.y) == (3, 4)


def test_a_declaration_below_one_that_replaces_the_class_is_noticed() -> None:
    @dataclass(slots=True)
    @device("d")
    class Device:
        x: U8 = 0

    with pytest.raises(DeclarationError, match="put @device or @state above it"):
        vmstate_of(Device)
    with pytest.raises(UsageError, match="Device is not declared"):
        save(Device())


def test_a_subsection_that_would_be_taken_for_that_of_a_struct_is_refused() -> None:
    @state("dev/part")
    class Part:
        x: U8

    @state("dev")
    @dataclass
    class Nested:
        part: Annotated[Part | None, subsection] = None

    @state("holder")
    @dataclass
    class Holder:
        nested: Nested = field(default_factory=Nested)

    class Device:
        holder: Holder
        n: Annotated[U8, since(2)]
        part: Annotated[Part | None, subsection]

    message = r"Device\.part: the name 'dev/part' begins with 'dev', so that a .*Nested before it"
    with pytest.raises(DeclarationError, match=message):
        device("dev", version=2)(Device)

    class Apart(Device):
        holder: Holder
        n: U8

    device("dev", version=2)(Apart)


def nested(depth: int, inner: type[Any] | None = None) -> type[Any]:
    """A state that holds a state, and so on, *depth* of them below it."""
    for number in range(depth + 1):
        cls = type(f"Level{number}", (), {"__annotations__": {"x": inner or U8}})
        inner = state(f"level{number}")(cls)
    assert inner is not None
    return inner


def test_states_that_are_nested_too_deep_for_a_description_are_refused() -> None:
    nested(9)
    with pytest.raises(DeclarationError, match=r"Level10\.x: states inside each other.* than 32"):
        nested(10)


def test_what_is_local_or_of_the_class_is_not_migrated() -> None:
    @device("d")
    @dataclass
    class Device:
        limit: ClassVar[int] = 7
        bus: Local[list[str]] = field(default_factory=list)
        x: U8 = 0

    assert save(Device(["a"], 5)) == b"\5"
    loaded = Device(["mine"])
    load(loaded, b"\6", 1)
    assert loaded == Device(["mine"], 6)


def test_fields_of_a_base_class_come_first() -> None:
    class Base:
        a: U8 = 1

    @device("d")
    class Device(Base):
        b: U8 = 2

    assert save(Device()) == b"\1\2"


def test_annotations_mean_what_they_mean_where_they_are_written() -> None:
    elsewhere: Any = ModuleType("elsewhere")
    elsewhere.Word = U32
    sys.modules["elsewhere"] = elsewhere
    try:
        base: Any = type("Base", (), {"__module__": "elsewhere", "a": 1})
        base.__annotations__ = {"a": "Word"}
        Word = U16  # noqa: N806

        @device("d")
        class Device(base):  # type: ignore[misc]
            b: Word = 2  # type: ignore[valid-type]

        assert save(Device()) == b"\0\0\0\1\0\2"
    finally:
        del sys.modules["elsewhere"]


def test_a_declared_class_is_none_to_those_derived_from_it() -> None:
    class Derived(Inner):
        pass

    with pytest.raises(DeclarationError, match="Derived is not declared"):
        vmstate_of(Derived)


def test_classes_of_attrs_are_declared_like_any_other() -> None:
    attrs = pytest.importorskip("attrs")

    @device("d")
    @attrs.define
    class Device:
        x: U8 = 0
        words: Annotated[list[U64], Array(2)] = attrs.field(factory=lambda: [1, 2])

    loaded = Device()
    load(loaded, save(Device(3, [4, 5])), 1)
    assert loaded == Device(3, [4, 5])


def test_the_declared_schema_is_that_of_dump_vmstate() -> None:
    @device("dev", version=3, minimum_version=1)
    @dataclass
    class Device:
        n: U16 = 0
        late: Annotated[U32, since(2), named("later")] = 0
        maybe: Annotated[U8, when(lambda dev: dev.n > 0)] = 0
        inner: Inner = field(default_factory=Inner)
        items: Annotated[list[Inner], VarArray("n", bound=8)] = field(default_factory=list)
        fixed: Annotated[list[list[I32]], Array(2, 3)] = field(default_factory=list)
        queue: Annotated[list[Inner], Queue()] = field(default_factory=list)
        _gap: ClassVar[Annotated[None, Gap(5)]]
        part: Annotated[Inner | None, subsection] = None

    inner = {
        "name": "dev/inner",
        "version_id": 2,
        "minimum_version_id": 2,
        "Fields": [
            {"field": "x", "version_id": 0, "field_exists": False, "size": 1, "type": "uint8"}
        ],
    }

    def entry(name: str, size: int, kind: str, *, version: int = 0, **more: Any) -> dict[str, Any]:
        of_all = {"field": name, "version_id": version, "field_exists": False, "size": size}
        return of_all | {"type": kind} | more

    assert declared(Device) == {
        "Name": "dev",
        "version_id": 3,
        "minimum_version_id": 1,
        "Description": {
            "name": "dev",
            "version_id": 3,
            "minimum_version_id": 1,
            "Fields": [
                entry("n", 2, "uint16"),
                entry("later", 4, "uint32", version=2),
                entry("maybe", 1, "uint8", field_exists=True),
                entry("inner", 1, "struct", Description=inner),
                entry("items", 1, "struct", num=8, num_field="n", Description=inner),
                entry("fixed", 4, "int32", num=6),
                entry("queue", 0, "qtailq", Description=inner),
                entry("unused", 5, "unused_buffer"),
            ],
            "Subsections": [inner],
        },
    }
