"""From one annotation to the kind of field that it declares."""

from __future__ import annotations

import re
from types import NoneType
from typing import Any, Final, get_args, get_origin

from vmferry.errors import DeclarationError

from . import plan as p
from . import types as t
from .hints import Spelled, split

_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_LARGEST: Final = 64 << 20
"""Bytes, or elements, that one field may have: as many as a device section."""

_SUCH_AS: Final = {
    float: "Float64",
    bytes: "Buffer(16)",
    bytearray: "Buffer(16)",
    list: "Array(4)",
    dict: "Tree()",
}
"""For what cannot be sent as it is, what may be meant; numbers go without saying."""

_NUMBER: Final = re.compile(r"Annotated\[int, Integer\(size=(\d), signed=(False|True)\)\]")


def plan_of(cls: Any) -> p.Plan | None:
    """The plan of a class that is declared itself, not only derived from one that is."""
    plan = cls.__dict__.get(p.PLAN) if isinstance(cls, type) else None
    # A decorator that replaces the class copies the attribute.
    return plan if isinstance(plan, p.Plan) and plan.cls is cls else None


def kind_of(spelled: Spelled, where: str) -> p.Kind:  # noqa: PLR0911 - one for each kind
    """The kind of field that an annotation declares."""
    hint, kind = spelled.type, spelled.kind
    match kind:
        case None:
            return _plain(hint, where)
        case t.Integer(size, signed):
            _expect(
                hint is int and size in _CODES, where, "Integer of 1, 2, 4 or 8 is an int", hint
            )
            code = _CODES[size].lower() if signed else _CODES[size]
            return p.Scalar(f"{'' if signed else 'u'}int{8 * size}", code)
        case t.Double():
            _expect(hint is float, where, "Double is a float", hint)
            return p.Scalar("float64", "d")
        case t.Expiry():
            _expect(spelled.optional == (int, True), where, "a timer is an int | None", hint)
            return p.Scalar("timer", "q")
        case t.Bitmap(bits):
            _expect(hint is int and 0 < bits <= 8 * _LARGEST, where, "a bitmap is an int", hint)
            return p.Bitmap(bits)
        case t.Gap(size):
            _expect(hint is None or hint is NoneType, where, "a gap is None", hint)
            _expect(0 < size <= _LARGEST, where, f"a gap has 1 to {_LARGEST} bytes", size)
            return p.Gap(size)
        case t.Custom(codec):
            _expect(_is_codec(codec), where, "a codec has a type, save and load", codec)
            return p.Custom(codec)
        case t.Temporary(save, load):
            return p.Temporary(_declared(hint, where, "a temporary"), save, load)
        case t.Buffer() | t.VarBuffer():
            return _bytes(hint, kind, where)
        case t.Array() | t.VarArray():
            return _elements(hint, kind, where)
    return _linked(hint, kind, where)


def _plain(hint: Any, where: str) -> p.Kind:
    """The kind of a type that needs no more words."""
    if hint is bool:
        return p.Scalar("bool", "?")
    if (plan := plan_of(hint)) is not None:
        return p.Struct(plan, plan.version)
    such = _SUCH_AS.get(get_origin(hint) or hint, "U32")
    advice = f"a kind such as {such}, a class declared with @state"
    bare, optional = Spelled(hint, None, (), local=False).optional
    if optional and plan_of(bare) is not None:
        advice = "a subsection for a state that may be absent, an array of them"
    raise DeclarationError(
        f"{where}: {_shown(hint)} does not say how it is sent; use {advice}, or Local[...] for what"
        " is not migrated"
    )


def _is_codec(codec: Any) -> bool:
    methods = callable(getattr(codec, "save", None)) and callable(getattr(codec, "load", None))
    return methods and isinstance(getattr(codec, "type", None), str)


def _bytes(hint: Any, kind: t.Buffer | t.VarBuffer, where: str) -> p.Bytes:
    _expect(hint in (bytes, bytearray), where, "a buffer is bytes or bytearray", hint)
    mutable = hint is bytearray
    if isinstance(kind, t.VarBuffer):
        _expect(0 < kind.bound <= _LARGEST, where, f"a bound of 1 to {_LARGEST}", kind.bound)
        return p.Bytes(kind.bound, count=kind.count, mutable=mutable)
    total = kind.start + kind.size if kind.of is None else kind.of
    _expect(0 < kind.size <= _LARGEST, where, f"a size of 1 to {_LARGEST}", kind.size)
    _expect(0 <= kind.start <= total - kind.size, where, f"bytes within {total}", kind)
    _expect(mutable or total == kind.size, where, "a partial buffer is a bytearray", hint)
    return p.Bytes(kind.size, kind.start, total, mutable=mutable)


def _elements(hint: Any, kind: t.Array | t.VarArray, where: str) -> p.Elements:
    shape = kind.shape if isinstance(kind, t.Array) else ()
    deep = "a list[...]" if len(shape) < 2 else f"lists in lists, {len(shape)} deep"
    for _ in shape[:-1]:
        _expect(get_origin(hint) is list, where, f"an array is {deep}", hint)
        (hint,) = get_args(hint)
    _expect(get_origin(hint) is list, where, f"an array is {deep}", hint)
    inner = split(get_args(hint)[0], where)
    bare, nullable = inner.optional
    nullable = nullable and not isinstance(inner.kind, t.Expiry)
    _expect(not inner.conditions, where, "elements without conditions", hint)
    element = kind_of(split(bare, where) if nullable else inner, where)
    _expect(
        not isinstance(element, p.Elements | p.Gap | p.Temporary), where, "an element", inner.kind
    )
    if isinstance(kind, t.Array):
        whole = bool(shape) and all(type(n) is int and n > 0 for n in shape)
        _expect(whole, where, "a shape of positive numbers, as in Array(4)", shape)
        length = p.product(shape)
        _expect(length <= _LARGEST, where, f"at most {_LARGEST} elements", length)
        return p.Elements(element, shape, nullable=nullable)
    _expect(0 < kind.bound <= _LARGEST, where, f"a bound of 1 to {_LARGEST}", kind.bound)
    _expect(kind.multiple > 0, where, "a multiple of at least 1", kind.multiple)
    return p.Elements(
        element,
        count=kind.count,
        bound=kind.bound,
        multiple=kind.multiple,
        nullable=nullable,
    )


def _linked(hint: Any, kind: Any, where: str) -> p.Kind:
    _expect(isinstance(kind, t.Queue | t.Tree), where, "a kind of field", kind)
    _expect(0 < kind.bound <= _LARGEST, where, f"a bound of 1 to {_LARGEST}", kind.bound)
    if isinstance(kind, t.Queue):
        _expect(get_origin(hint) is list, where, "a queue is a list[...]", hint)
        return p.Queue(_declared(get_args(hint)[0], where, "an element of a queue"), kind.bound)
    _expect(get_origin(hint) is dict, where, "a tree is a dict[...]", hint)
    key, value = get_args(hint)
    key_plan = None if key is int else _declared(key, where, "a key that is no int")
    return p.Tree(key_plan, _declared(value, where, "a value of a tree"), kind.bound)


def _declared(hint: Any, where: str, what: str) -> p.Plan:
    plan = plan_of(hint)
    _expect(plan is not None, where, f"{what} is of a class declared with @state", hint)
    return plan  # type: ignore[return-value]


def _expect(holds: bool, where: str, expected: str, found: Any) -> None:
    if not holds:
        raise DeclarationError(f"{where}: {expected}; found {_shown(found)}")


def _shown(found: Any) -> str:
    """What was found, as one would write it."""
    if isinstance(found, type) and not get_args(found):
        return found.__qualname__
    text = repr(found).replace("typing.", "")
    return _NUMBER.sub(lambda m: f"{'I' if m[2] == 'True' else 'U'}{8 * int(m[1])}", text)
