"""The record as a key of etcd, and engines that are alive as keys with a lease.

By etcd's HTTP/JSON gateway (``/v3/kv/range``, ``/v3/kv/txn``, ``/v3/lease/...``, etcd 3.4 and
later).  Reads are linearizable, so that they show every change that was answered before.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import threading
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from vmferry.errors import StorageError, UsageError, printable

from .protocol import Swap
from .record import decode
from .store import Outcome, Seen, StoreSilent

_TERM: Final = 15.0
_MIN_TERM: Final = 2
_MAX_TERM: Final = 3600
_MAX_ANSWER: Final = 1 << 20
_PATIENCE: Final = 2.0
"""Seconds without a byte of the answer; a member that is well needs a few milliseconds."""


class EtcdStore:
    """The record at *key*; ``key/alive/NAME/LEASE`` exists while the engine *NAME* is heard of.

    A key for each lease: a request that arrives late cannot tie a younger lease's to an older one.

    *term* is how many seconds etcd waits for a sign of life.
    """

    def __init__(self, host: str, port: int, key: str, *, term: float = _TERM) -> None:
        self._host, self._port, self._key = host, port, key
        self.term: float = term
        at = f"[{host}]" if ":" in host else host
        self.uri = f"etcd://{at}:{port}/{key}?term={term:g}"
        self._leases: dict[str, str] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, uri: str) -> EtcdStore:
        """From ``etcd://HOST:PORT/KEY?term=SECONDS``."""
        try:
            parts = urlsplit(uri)
            host, port = parts.hostname or "", parts.port or 2379
            options = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
            term = float(options.pop("term", [str(_TERM)])[-1])
        except ValueError as error:
            raise UsageError(f"{printable(uri)}: {error}") from error
        key = parts.path.lstrip("/")
        if not host or not key or options or parts.username or not key.isprintable():
            raise UsageError(f"expected etcd://HOST:PORT/KEY?term=SECONDS, found {printable(uri)}")
        if not _MIN_TERM <= term <= _MAX_TERM or not term.is_integer():
            raise UsageError(
                f"term: expected {_MIN_TERM} to {_MAX_TERM} whole seconds, found {term:g}"
            )
        return cls(host, port, key, term=term)

    def read(self) -> Seen:
        """See :class:`~.store.Store`."""
        found = self._call("kv/range", {"key": _b64(self._key)}).get("kvs") or []
        if not found:
            return Seen(None, b"0")
        value, revision = found[0].get("value"), found[0].get("mod_revision")
        if not isinstance(value, str) or not isinstance(revision, str):
            raise StoreSilent(f"{self.uri}: expected a value and its revision, found neither")
        return Seen(decode(_unb64(value), self.uri), revision.encode())

    def swap(self, seen: Seen, swap: Swap) -> Outcome:
        """See :class:`~.store.Store`."""
        put = {"key": _b64(self._key), "value": _b64(swap.record.encode().decode())}
        try:
            if self._commit(self._is_still(seen) + self._are_gone(swap.gone), [put]):
                return Outcome.LANDED
        except StoreSilent:
            return Outcome.UNKNOWN
        if not swap.gone:
            return Outcome.LOST
        try:
            return Outcome.LOST if self.read().mark != seen.mark else Outcome.NOT_GONE
        except StoreSilent:
            return Outcome.LOST  # it has not landed, and whoever wants it reads again

    def gone(self, name: str) -> bool:
        """See :class:`~.store.Store`."""
        return not self._call("kv/range", self._alive(name)).get("kvs")

    def keep(self, name: str, seen: Seen | None) -> bool:
        """See :class:`~.store.Store`."""
        with self._lock:
            lease = self._leases.get(name)
            if lease is not None and self._renewed(lease):
                return True
            granted = self._call("lease/grant", {"TTL": str(math.ceil(self.term))})
            lease = str(granted.get("ID"))
            sign = f"{self._key}/alive/{name}/{lease}"
            put = {"key": _b64(sign), "value": "", "lease": lease}
            if not self._commit([] if seen is None else self._is_still(seen), [put]):
                return False
            self._leases[name] = lease
            return True

    def leave(self, name: str) -> None:
        """See :class:`~.store.Store`."""
        with self._lock:
            if (lease := self._leases.pop(name, None)) is not None:
                self._call("lease/revoke", {"ID": lease})

    def _renewed(self, lease: str) -> bool:
        result = self._call("lease/keepalive", {"ID": lease}).get("result")
        return isinstance(result, dict) and result.get("TTL", "0") not in {"0", 0}

    def _alive(self, name: str) -> dict[str, str]:
        """The range of an engine's signs of life."""
        signs = f"{self._key}/alive/{name}"
        return {"key": _b64(f"{signs}/"), "range_end": _b64(f"{signs}0")}

    def _is_still(self, seen: Seen) -> list[dict[str, str]]:
        revision = {"target": "MOD", "result": "EQUAL", "mod_revision": seen.mark.decode()}
        return [{"key": _b64(self._key), **revision}]

    def _are_gone(self, name: str) -> list[dict[str, str]]:
        if not name:
            return []
        never = {"target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        return [{**self._alive(name), **never}]

    def _commit(self, compare: list[dict[str, str]], puts: list[dict[str, str]]) -> bool:
        requests = [{"request_put": put} for put in puts]
        answer = self._call("kv/txn", {"compare": compare, "success": requests})
        return answer.get("succeeded") is True

    def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_PATIENCE)
        try:
            connection.request("POST", f"/v3/{path}", json.dumps(body))
            answer = connection.getresponse()
            text = answer.read(_MAX_ANSWER)
            values = json.loads(text)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise StoreSilent(f"{self.uri}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if not isinstance(values, dict) or answer.status != http.HTTPStatus.OK:
            raise StoreSilent(f"{self.uri}: answered {answer.status} {printable(text[:200])}")
        return values


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _unb64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise StorageError(f"expected base64 from etcd: {error}") from None
