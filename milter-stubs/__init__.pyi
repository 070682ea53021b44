"""Types of the extension module: see help(milter)."""

import sys
from collections.abc import Callable
from os import PathLike
from typing import Any, Final, final

from _typeshed import structseq
from typing_extensions import Buffer, TypeAlias

# For Milter, which gives all of these names too; the extension has no such list.
__all__ = [
    "ACCEPT",
    "ADDHDRS",
    "ADDRCPT",
    "ADDRCPT_PAR",
    "ALL_OPTS",
    "CHGBODY",
    "CHGFROM",
    "CHGHDRS",
    "CHUNK_SIZE",
    "CONTINUE",
    "CURR_ACTS",
    "CURR_PROT",
    "DELRCPT",
    "DISCARD",
    "FAILURE",
    "F_NONE",
    "InvalidArgument",
    "MAX_DATA_SIZE",
    "MODBODY",
    "M_CONNECT",
    "M_DATA",
    "M_ENVFROM",
    "M_ENVRCPT",
    "M_EOH",
    "M_EOM",
    "M_HELO",
    "NOREPLY",
    "PROT_VERSION",
    "P_HDR_LEADSPC",
    "P_MDS_1M",
    "P_MDS_256K",
    "P_NOBODY",
    "P_NOCONNECT",
    "P_NODATA",
    "P_NOEOH",
    "P_NOHDRS",
    "P_NOHELO",
    "P_NOHREPL",
    "P_NOMAIL",
    "P_NORCPT",
    "P_NOUNKNOWN",
    "P_NR_BODY",
    "P_NR_CONN",
    "P_NR_DATA",
    "P_NR_EOH",
    "P_NR_HDR",
    "P_NR_HELO",
    "P_NR_MAIL",
    "P_NR_RCPT",
    "P_NR_UNKN",
    "P_RCPT_REJ",
    "P_SKIP",
    "QUARANTINE",
    "REJECT",
    "SETSYMLIST",
    "SKIP",
    "SUCCESS",
    "TEMPFAIL",
    "V1_ACTS",
    "V1_PROT",
    "V2_ACTS",
    "V2_PROT",
    "VERSION",
    "error",
    "getdiag",
    "getversion",
    "main",
    "milterContext",
    "opensocket",
    "register",
    "set_abort_callback",
    "set_body_callback",
    "set_close_callback",
    "set_connect_callback",
    "set_drain_timeout",
    "set_engine",
    "set_envfrom_callback",
    "set_envrcpt_callback",
    "set_eoh_callback",
    "set_eom_callback",
    "set_exception_policy",
    "set_flags",
    "set_header_callback",
    "set_helo_callback",
    "setbacklog",
    "setconn",
    "setdbg",
    "setmaxdatasize",
    "settimeout",
    "stop",
]

_Text: TypeAlias = str | bytes
_Callback: TypeAlias = Callable[..., Any] | None

class error(Exception): ...
class InvalidArgument(error, ValueError): ...

@final
class milterContext:
    @property
    def actions(self) -> int: ...
    @property
    def protocol(self) -> int: ...
    def addheader(self, name: _Text, value: _Text, idx: int = -1) -> None: ...
    def addrcpt(self, rcpt: _Text, params: _Text | None = None) -> None: ...
    def chgfrom(self, sender: _Text, params: _Text | None = None) -> None: ...
    def chgheader(self, name: _Text, idx: int, value: _Text | None) -> None: ...
    def delrcpt(self, rcpt: _Text) -> None: ...
    def getpriv(self) -> Any: ...
    def getsymval(self, name: _Text) -> str | None: ...
    def progress(self) -> None: ...
    def quarantine(self, reason: _Text) -> None: ...
    def replacebody(self, body: str | Buffer) -> None: ...
    def setpriv(self, priv: object, /) -> Any: ...
    def setreply(
        self,
        rcode: _Text,
        xcode: _Text | None = None,
        msg: _Text | None = None,
        *more: _Text | None,
    ) -> None: ...
    def setsymlist(self, stage: int, macros: _Text) -> None: ...

@final
class _Diagnostics(structseq[int], tuple[int, int]):
    if sys.version_info >= (3, 10):
        __match_args__: Final = ("created", "deleted")
    @property
    def created(self) -> int: ...
    @property
    def deleted(self) -> int: ...
    @property
    def messages(self) -> int: ...
    @property
    def inside(self) -> int: ...

class _Decoder:
    _envfrom_errors: str | None
    _envrcpt_errors: str | None
    _header_errors: str | None
    def envfrom_bytes(self, *b: bytes) -> int: ...
    def envrcpt_bytes(self, *b: bytes) -> int: ...
    def header_bytes(self, fld: str, val: bytes) -> int: ...

_MAX_SOCKET_PATH: int

def _parse_socket(
    text: str | bytes, either_order: bool = False, /
) -> tuple[str, str | int | None, str | None]: ...
def _text(call: str, argument: str, value: object, /) -> bytes: ...
def _line(call: str, argument: str, value: object, /) -> bytes: ...
def _nonempty_line(call: str, argument: str, value: object, /) -> bytes: ...
def _header_name(call: str, value: object, /) -> bytes: ...
def _header_value(call: str, value: object, /) -> bytes: ...
def _check_reply(
    rcode: object, xcode: object = None, msg: object = None, *more: object
) -> tuple[bytes, bytes | None, list[bytes]]: ...
def _header_index(call: str, value: object, below_zero: bool, /) -> int: ...
def _symlist(stage: object, macros: object, /) -> bytes: ...
def _steps() -> dict[str, tuple[int, int, bool]]: ...
def _check_moment(call: str, step: str | None, actions: int, /) -> None: ...
def _verdict(step: str, result: object, protocol: int, /) -> int: ...
def _ends_message(step: str, verdict: int, /) -> bool: ...
def _sends_reply(step: str, verdict: int, rcode: str, /) -> bool: ...
def _call_objects(functions: dict[str, Callable[..., Any]], /) -> None: ...
def _share_socket(count: int, /) -> None: ...
def _listening_socket() -> int: ...
def _accepts() -> bool: ...
def _is_running() -> bool: ...
def _leave_signals(on: bool, /) -> None: ...
def _forget_stop() -> None: ...
def _stop_with(exception: BaseException, /) -> None: ...
def _when_serving(call: Callable[[], object], /) -> None: ...
def _note_coroutines(only_coroutines: bool, /) -> None: ...
def _attend(first_step: Callable[..., tuple[int, Any]], /) -> int: ...
def _take_turn() -> int: ...
def _dismiss() -> None: ...
def _hand_over(milliseconds: int, /) -> None: ...
def _become_worker(index: int, lifeline: int, report: int, /) -> None: ...
def _worker_gone(index: int, /) -> None: ...
def _fork_worker(serve: Callable[[], int], /) -> int: ...
def _hold_signals(on: bool, /) -> None: ...
def _await(descriptors: list[int], timeout: int, /) -> None: ...
def _stop_state() -> tuple[bool, int, int]: ...
def _unique_id() -> int: ...
def _last_unique_id() -> int: ...
def _metrics(on: object, /) -> bool: ...
def _metrics_snapshot() -> dict[str, Any]: ...
def _observe(observer: object, /) -> None: ...
def getdiag() -> _Diagnostics: ...
def getversion() -> tuple[int, int, int]: ...
def main() -> None: ...
def opensocket(rmsock: object, /) -> None: ...
def register(
    name: _Text,
    unknown: _Callback = ...,
    data: _Callback = ...,
    negotiate: _Callback = ...,
) -> None: ...
def set_abort_callback(callback: _Callback, /) -> Any: ...
def set_body_callback(callback: _Callback, /) -> Any: ...
def set_close_callback(callback: _Callback, /) -> Any: ...
def set_connect_callback(callback: _Callback, /) -> Any: ...
def set_drain_timeout(seconds: float, /) -> None: ...
def set_engine(name: str, /) -> None: ...
def set_envfrom_callback(callback: _Callback, /) -> Any: ...
def set_envrcpt_callback(callback: _Callback, /) -> Any: ...
def set_eoh_callback(callback: _Callback, /) -> Any: ...
def set_eom_callback(callback: _Callback, /) -> Any: ...
def set_exception_policy(code: int, /) -> None: ...
def set_flags(flags: int, /) -> None: ...
def set_header_callback(callback: _Callback, /) -> Any: ...
def set_helo_callback(callback: _Callback, /) -> Any: ...
def setbacklog(n: int, /) -> None: ...
def setconn(name: str | bytes | PathLike[str] | PathLike[bytes], /) -> None: ...
def setdbg(level: int, /) -> None: ...
def setmaxdatasize(size: int, /) -> int: ...
def settimeout(seconds: int, /) -> None: ...
def stop() -> None: ...

ACCEPT: Final[int]
ADDHDRS: Final[int]
ADDRCPT: Final[int]
ADDRCPT_PAR: Final[int]
ALL_OPTS: Final[int]
CHGBODY: Final[int]
CHGFROM: Final[int]
CHGHDRS: Final[int]
CHUNK_SIZE: Final[int]
CONTINUE: Final[int]
CURR_ACTS: Final[int]
CURR_PROT: Final[int]
DELRCPT: Final[int]
DISCARD: Final[int]
FAILURE: Final[int]
F_NONE: Final[int]
MAX_DATA_SIZE: Final[int]
MODBODY: Final[int]
M_CONNECT: Final[int]
M_DATA: Final[int]
M_ENVFROM: Final[int]
M_ENVRCPT: Final[int]
M_EOH: Final[int]
M_EOM: Final[int]
M_HELO: Final[int]
NOREPLY: Final[int]
PROT_VERSION: Final[int]
P_HDR_LEADSPC: Final[int]
P_MDS_1M: Final[int]
P_MDS_256K: Final[int]
P_NOBODY: Final[int]
P_NOCONNECT: Final[int]
P_NODATA: Final[int]
P_NOEOH: Final[int]
P_NOHDRS: Final[int]
P_NOHELO: Final[int]
P_NOHREPL: Final[int]
P_NOMAIL: Final[int]
P_NORCPT: Final[int]
P_NOUNKNOWN: Final[int]
P_NR_BODY: Final[int]
P_NR_CONN: Final[int]
P_NR_DATA: Final[int]
P_NR_EOH: Final[int]
P_NR_HDR: Final[int]
P_NR_HELO: Final[int]
P_NR_MAIL: Final[int]
P_NR_RCPT: Final[int]
P_NR_UNKN: Final[int]
P_RCPT_REJ: Final[int]
P_SKIP: Final[int]
QUARANTINE: Final[int]
REJECT: Final[int]
SETSYMLIST: Final[int]
SKIP: Final[int]
SUCCESS: Final[int]
TEMPFAIL: Final[int]
V1_ACTS: Final[int]
V1_PROT: Final[int]
V2_ACTS: Final[int]
V2_PROT: Final[int]
VERSION: Final[int]
