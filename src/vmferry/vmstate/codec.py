"""Saving and loading the objects of declared classes.

For each class and version a codec is compiled once.  Numbers that follow one another are one call
of ``struct`` and one of ``attrgetter``, whatever else is one call of its codec in :mod:`.values`.

Loading decodes everything before it changes anything, with one exception: ``pre_load`` runs first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vmferry.errors import StateError, printable

from . import plan as p
from . import texts
from .access import Assign, assigner
from .arrays import Items, Numbers
from .linked import Queue, Tree
from .runs import Run
from .staging import Blank, Frame, Kept, Loader, Saver, View, begin_saving, run_hook
from .values import Bits, Bytes, Custom, Number, One, Value, shown

_SUBSECTION: Final = 5
_HEAD: Final = struct.Struct(">I")


def compile_plan(plan: p.Plan, version: int) -> StateCodec:
    """The codec of *plan* for streams of *version*."""
    codec = plan.codecs.get(version)
    if codec is None:
        codec = plan.codecs[version] = StateCodec(plan, version)
    return codec


class _Step(Protocol):
    """Saves and loads some of an object's fields."""

    def save(self, obj: Any, saver: Saver) -> str:
        """Add the bytes, and return the entries that describe them."""

    def load(self, loader: Loader, frame: Frame) -> None:
        """Take the bytes, and stage what they assign."""


class StateCodec:
    """The codec of one declared class, in one version."""

    def __init__(self, plan: p.Plan, version: int) -> None:
        self.plan = plan
        self._version = version
        self._steps = tuple(_steps(plan, version))
        self._head = texts.state_head(plan, version)
        runs = [step.text for step in self._steps if isinstance(step, Run)]
        self._constant = ""
        if len(runs) == len(self._steps):
            self._constant = f"{self._head}[{texts.together(runs)}]"
        self._parts = {
            part.plan.name: (part, compile_plan(part.plan, part.plan.version), _head(part.plan))
            for part in plan.subsections
        }
        first = self._steps[0] if len(self._steps) == 1 else None
        bare = not plan.hooks and not plan.subsections
        self._only_run = first if bare and isinstance(first, Run) else None
        self._watched = any(field.when is not None for field in plan.fields)
        self._counted = any(getattr(field.kind, "count", None) for field in plan.fields)

    def save(self, obj: Any, saver: Saver) -> str:
        """Add the bytes of *obj*, hooks included, and return what describes them."""
        begin_saving(self.plan, obj, saver.after)
        fields = [step.save(obj, saver) for step in self._steps]
        # What only has numbers is described alike each time, and large machines have a lot of it.
        described = self._constant or f"{self._head}[{texts.together(fields)}]"
        if not self._parts:
            return described
        subsections: list[str] = []
        for part, codec, head in self._parts.values():
            value = needed_part(part, obj)
            if value is not None:
                saver.parts.append(head)
                try:
                    subsections.append(f"{{{codec.save(value, saver)}}}")
                except StateError as error:
                    raise error.inside(part.attribute) from error.__cause__
        if not subsections:
            return described
        return f'{described}, "subsections": [{texts.together(subsections)}]'

    def load_into(self, loader: Loader, obj: Any) -> Any:
        """Decode the state of *obj*, stage it, and say how it will look if that is recorded."""
        if self._only_run is not None and not loader.recording:
            self._only_run.stage(loader, obj)
            return None
        hooks = self.plan.hooks
        if "pre_load" in hooks:
            run_hook(f"{self.plan.cls.__qualname__}.pre_load", obj.pre_load)
        frame = self._decode(loader, obj)
        if "post_load" in hooks:
            self._due(loader, obj)
        return View(frame)

    def load_new(self, loader: Loader) -> Any:
        """Decode a state, and make an object of it; its ``post_load`` waits for the others."""
        cls, required = self.plan.cls, self.plan.required
        if required is None:
            raise StateError(
                f"an object of {cls.__qualname__} to load into", "none, and it cannot be made"
            )
        target: Any = Blank(self.plan.defaults) if required else run_hook(cls.__name__, cls)
        hooks = self.plan.hooks
        if "pre_load" in hooks and not required:
            run_hook(f"{cls.__qualname__}.pre_load", target.pre_load)
        outer, loader.commits = loader.commits, []
        try:
            frame = self._decode(loader, target)
            loader.commit()
        finally:
            loader.commits = outer
        if required:
            attributes = vars(target)
            arguments = {name: attributes.pop(name) for name in required}
            target = run_hook(cls.__name__, lambda: cls(**arguments))
            for name, value in attributes.items():
                setattr(target, name, value)
            frame.obj = target
        if "post_load" in hooks:
            self._due(loader, target)
        return target

    def _due(self, loader: Loader, obj: Any) -> None:
        name = f"{self.plan.cls.__qualname__}.post_load"
        loader.after.append((obj, lambda: run_hook(name, obj.post_load, self._version)))

    def _decode(self, loader: Loader, obj: Any) -> Frame:
        outer = loader.recording
        loader.recording = outer or self._watched
        frame = Frame(obj, self.plan.cls, loader.recording or self._counted)
        for step in self._steps:
            step.load(loader, frame)
        if self._parts:
            self._decode_parts(loader, frame)
        loader.recording = outer
        return frame

    def _decode_parts(self, loader: Loader, frame: Frame) -> None:
        missing = dict(self._parts)
        while (name := _subsection(loader, self.plan.name)) is not None:
            entry = missing.pop(name, None)
            if entry is None:
                twice = "twice" if name in self._parts else "which is not declared"
                raise StateError(f"a subsection of {self.plan.name}", f"{printable(name)}, {twice}")
            part, codec, head = entry
            at = loader.take(len(head))
            (version,) = _HEAD.unpack_from(loader.data, at + len(head) - _HEAD.size)
            try:
                check_version(part.plan, version)
                codec = compile_plan(part.plan, version)
                current = getattr(frame.obj, part.attribute, None)
                if current is None:
                    value = codec.load_new(loader)
                    loader.commits.append((assigner([part.attribute]), frame.obj, (value,)))
                else:
                    value = codec.load_into(loader, current)
            except StateError as error:
                raise error.inside(part.attribute) from error.__cause__
            frame.seen[part.attribute] = value
        for part, _, _ in missing.values():
            if part.needed is None:
                loader.commits.append((assigner([part.attribute]), frame.obj, (None,)))


def needed_part(part: p.Part, obj: Any) -> Any:
    """The state of a subsection that is to be sent, or ``None``."""
    if part.needed is not None and not part.needed(obj):
        return None
    value = getattr(obj, part.attribute, None)
    if (value is None and part.needed is None) or isinstance(value, part.plan.cls):
        return value
    raise StateError(f"an object of {part.plan.cls.__qualname__}", shown(value)).inside(
        part.attribute
    )


def check_version(plan: p.Plan, version: int) -> None:
    """Refuse a version that is too new or too old."""
    if not plan.minimum_version <= version <= plan.version:
        raise StateError(
            f"version {plan.minimum_version} to {plan.version} of {plan.name}", str(version)
        )


def _head(plan: p.Plan) -> bytes:
    name = plan.name.encode()
    return bytes([_SUBSECTION, len(name)]) + name + _HEAD.pack(plan.version)


def _subsection(loader: Loader, owner: str) -> str | None:
    """The name of the subsection of *owner* that begins here, if one does."""
    data, at = loader.data, loader.at
    if len(data) - at < 2 or data[at] != _SUBSECTION:
        return None
    name = bytes(data[at + 2 : at + 2 + data[at + 1]])
    prefix = owner.encode()
    if not name.startswith(prefix) or len(name) == len(prefix):
        return None
    return name.decode("utf-8", "backslashreplace")


# Steps


def _steps(plan: p.Plan, version: int) -> list[_Step]:
    steps: list[_Step] = []
    run: list[p.Field] = []
    names: list[str] = []
    for field, name in zip(plan.fields, texts.field_names(plan), strict=True):
        if not field.in_version(version):
            continue
        if field.when is None and isinstance(field.kind, p.Scalar | p.Gap):
            run.append(field)
            names.append(name)
            continue
        if run:
            steps.append(Run(run, names))
            run, names = [], []
        steps.append(_step(field, name, version))
    if run:
        steps.append(Run(run, names))
    return steps


def _step(field: p.Field, name: str, version: int) -> _Step:
    step: _Step
    match field.kind:
        case p.Scalar() | p.Gap():
            step = Run([field], [name])
        case p.Temporary() as kind:
            step = _Temporary(name, kind, compile_plan(kind.plan, kind.plan.version))
        case p.Elements() as kind:
            codec = _array(kind, alike=texts.alike(field))
            step = _attribute(field, name, codec)
        case kind:
            step = _attribute(field, name, _value(kind))
    return step if field.when is None else _Conditional(step, field.when, version)


def _attribute(field: p.Field, name: str, codec: Value | Numbers | Items) -> _Attribute:
    head = texts.entry_head(name)
    return _Attribute(field.attribute, head, codec, assigner([field.attribute]))


def _array(kind: p.Elements, *, alike: bool) -> Numbers | Items:
    """The codec of an array."""
    if isinstance(kind.element, p.Scalar) and not kind.nullable:
        return Numbers(kind, kind.element, alike=alike)
    return Items(kind, _value(kind.element), alike=alike)


def _value(kind: p.Kind) -> Value:  # noqa: PLR0911 - one for each kind
    """The codec of *kind*, which is no array."""
    match kind:
        case p.Scalar():
            text = texts.value(kind.type, kind.size)
            return Number(kind, struct.Struct(f">{kind.code}"), text)
        case p.Struct(plan, version):
            return One(kind, compile_plan(plan, version))
        case p.Bytes():
            return Bytes(kind)
        case p.Bitmap(bits):
            size = -(-bits // 64) * 8
            return Bits(bits, size, texts.value(kind.type, size))
        case p.Custom():
            return Custom(kind)
        case p.Queue(plan, bound):
            return Queue(compile_plan(plan, plan.version), bound)
        case p.Tree(key, value, bound):
            keys = None if key is None else compile_plan(key, key.version)
            return Tree(keys, compile_plan(value, value.version), bound)
    raise TypeError(f"{kind} is no attribute")


@dataclass(frozen=True, slots=True)
class _Attribute:
    """One attribute with a codec of its own; ``head`` begins its entries in descriptions."""

    attribute: str
    head: str
    codec: Value | Numbers | Items
    assign: Assign

    def save(self, obj: Any, saver: Saver) -> str:
        try:
            described = self.codec.save(getattr(obj, self.attribute, None), obj, saver)
        except StateError as error:
            raise error.inside(self.attribute) from error.__cause__
        if isinstance(described, str):
            return f"{self.head}{described}}}"
        return ", ".join([f"{self.head}{one}}}" for one in described])

    def load(self, loader: Loader, frame: Frame) -> None:
        try:
            value = self.codec.load(loader, frame, getattr(frame.obj, self.attribute, None))
        except StateError as error:
            raise error.inside(self.attribute) from error.__cause__
        if isinstance(value, Kept):
            frame.seen[self.attribute] = value.seen
        else:
            loader.commits.append((self.assign, frame.obj, (value,)))
            frame.seen[self.attribute] = value


@dataclass(frozen=True, slots=True)
class _Temporary:
    """A state that methods of the object make and take."""

    name: str
    kind: p.Temporary
    codec: StateCodec

    def save(self, obj: Any, saver: Saver) -> str:
        value = run_hook(self.kind.save, getattr(obj, self.kind.save))
        if not isinstance(value, self.kind.plan.cls):
            raise StateError(
                f"an object of {self.kind.plan.cls.__qualname__} from {self.kind.save}",
                shown(value),
            )
        since = len(saver.parts)
        inner = self.codec.save(value, saver)
        return texts.entry(self.name, texts.value(self.kind.type, saver.size(since), inner))

    def load(self, loader: Loader, frame: Frame) -> None:
        value = self.codec.load_new(loader)
        name = self.kind.load
        loader.after.append((frame.obj, lambda: run_hook(name, getattr(frame.obj, name), value)))


@dataclass(frozen=True, slots=True)
class _Conditional:
    """A step that a predicate decides on."""

    step: _Step
    test: Callable[[Any, int], bool]
    version: int

    def save(self, obj: Any, saver: Saver) -> str:
        return self.step.save(obj, saver) if self.test(obj, self.version) else ""

    def load(self, loader: Loader, frame: Frame) -> None:
        if self.test(View(frame), self.version):
            self.step.load(loader, frame)
