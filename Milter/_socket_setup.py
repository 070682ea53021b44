"""Who may connect to the filter, and who the filter is once its socket is open.

``runmilter`` and ``python -m Milter run`` open the socket through here. Filters that ask for
nothing of this load it too, so it imports little.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import sys

import milter

from . import _acl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

DEFAULT_MODE = 0o660
#: Symbolic links in a path, as many as the kernel follows.
_MAX_LINKS = 40


class UnsafeError(milter.error):
    """Going on would let somebody else do what they should not be able to."""


class Access:
    """What the arguments of ``runmilter`` ask for, checked; nothing is done before ``open``.

    Args:
        conn: where to listen, in libmilter's form.
        socket_mode: of a unix socket, from 0 to 0o777.
        socket_group: of a unix socket, name or number.
        user: who to become once the socket is open, name or number.
        group: of the process then, name or number; by default that of the user.
        is_known: what there is to say of the socket was said, by who opened it.

    Raises:
        milter.InvalidArgument: a value cannot be; the message names the argument.
        TypeError: a value is of the wrong type.
    """

    def __init__(
        self,
        conn: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        socket_mode: int | None = None,
        socket_group: str | int | None = None,
        user: str | int | None = None,
        group: str | int | None = None,
        is_known: bool = False,
    ) -> None:
        self._is_known = is_known
        self.conn = os.fsdecode(conn)
        self.kind, self.where = _take_apart(self.conn)
        for name, value in (("socket_mode", socket_mode), ("socket_group", socket_group)):
            if value is not None and self.kind != "unix":
                raise milter.InvalidArgument(f"{name} is for unix sockets, not for {self.conn!r}")
        self._asked = any(each is not None for each in (socket_mode, socket_group, user))
        self._mode = DEFAULT_MODE if socket_mode is None else _checked_mode(socket_mode)
        self._group = None if socket_group is None else _find_group("socket_group", socket_group)
        if user is None and group is not None:
            raise milter.InvalidArgument("group needs user: root in another group is still root")
        self.account = None if user is None else Account(user, group)

    def open(self, rmsock: bool) -> None:
        """Open the socket, and be root no more.

        Raises:
            milter.error: it cannot be done; nothing is left open then.
        """
        if self.kind == "unix" and self._asked:
            self.bind(lambda: milter.opensocket(rmsock), shut)
        else:
            milter.opensocket(rmsock)
        try:
            if self.account is not None:
                self.account.become()
            if not self._is_known:
                self._warn()
        except BaseException:
            shut()
            raise

    # --- the directory ---------------------------------------------------------------------

    def check_directory(self) -> None:
        """Refuse a directory in which somebody else could put a socket in the place of ours.

        Every directory on the way there counts, also where symbolic links lead through it: all
        must belong to root, to this process' user or to ``user``, and nobody else may write to
        them, by mode or by a POSIX access control list. Above the socket's own directory the
        sticky bit makes up for the latter, as in ``/tmp``. Nor may that directory's default list
        open to others what is made in it; those above are for directories that are not made yet.

        Raises:
            UnsafeError: it is so, or there is no such directory; the message says what to do.
        """
        directory = os.path.join(os.getcwd(), os.path.dirname(self.where))
        owner = f"-o {self.account.name} " if self.account is not None else ""
        if self._group is not None:
            owner += f"-g {_group_name(self._group)} "
        create = f"install -d {owner}-m 0750"
        try:
            resolved = self._walk(directory)
            status = os.stat(resolved)
            who = next(self._strangers_who_write(resolved, status), ("", ""))[0]
            heir = next(self._strangers_in(resolved, _acl.DEFAULT), ("", ""))[0]
        except OSError as exc:
            raise UnsafeError(
                f"the socket's directory {os.path.normpath(directory)} cannot be used: "
                f"{exc.strerror}; create it: {create} {os.path.normpath(directory)}"
            ) from exc
        if who:
            name = os.path.splitext(os.path.basename(self.where))[0]
            raise UnsafeError(
                f"{who} may write to the socket's directory {_described(resolved, status)}, and so "
                f"put another socket there: use a directory of the filter's own, such as: {create} "
                f"{os.path.join(resolved, name)}"
            )
        if heir:
            raise UnsafeError(
                f"{heir} may write to what is made in the socket's directory "
                f"{_described(resolved, status)}, by its default access control list: "
                f"setfacl -k {resolved}"
            )

    def _walk(self, directory: str) -> str:
        """Go there, through every directory and symbolic link; returns where that is."""
        current, links = "/", 0
        pending = directory.split("/")
        while pending:
            part = pending.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                current = os.path.dirname(current)
                continue
            self._check_above(current)
            place = os.path.join(current, part)
            status = os.lstat(place)
            self._check_owner(place, status)
            if not stat.S_ISLNK(status.st_mode):
                if not stat.S_ISDIR(status.st_mode):
                    raise UnsafeError(f"{place} is no directory; use another path")
                current = place
                continue
            links += 1
            if links > _MAX_LINKS:
                raise UnsafeError(f"too many symbolic links on the way to {directory}")
            target = os.readlink(place)
            pending = target.split("/") + pending
            current = "/" if target.startswith("/") else current
        return current

    def _check_above(self, place: str) -> None:
        """Nobody else may exchange what is in a directory on the way."""
        status = os.stat(place)
        if status.st_mode & stat.S_ISVTX:
            return
        for who, cure in self._strangers_who_write(place, status):
            raise UnsafeError(
                f"{who} may write to {_described(place, status)}, above the socket, and so put "
                f"another directory there: {cure}"
            )

    def _check_owner(self, place: str, status: os.stat_result) -> None:
        if status.st_uid not in self._trusted_users():
            raise UnsafeError(
                f"{_described(place, status)} belongs to another user, who could replace the "
                "socket: use a directory below none of theirs"
            )

    def _strangers_who_write(self, place: str, status: os.stat_result) -> Iterator[tuple[str, str]]:
        """Who, beside those we trust, may write there, and what makes an end of it."""
        if status.st_mode & stat.S_IWOTH:
            yield "everybody", f"chmod o-w {place}"
        # With a list, these bits of the mode are its mask: for whom, it alone says.
        if not status.st_mode & stat.S_IWGRP:
            return
        listed = _acl.writers(place, _acl.ACCESS)
        owning = listed is None or (_acl.GROUP_OBJ, -1) in listed
        if owning and status.st_gid not in self._trusted_groups():
            cure = f"chmod g-w {place}" if listed is None else f"setfacl -m g::r-x {place}"
            yield f"the group {_group_name(status.st_gid)}", cure
        yield from self._strangers_in(place, _acl.ACCESS)

    def _strangers_in(self, place: str, name: str) -> Iterator[tuple[str, str]]:
        """The same for the users and groups that an access control list names."""
        for kind, number in _acl.writers(place, name) or ():
            if kind == _acl.USER and number not in self._trusted_users():
                yield f"the user {_user_name(number)}", f"setfacl -x u:{number} {place}"
            if kind == _acl.GROUP and number not in self._trusted_groups():
                yield f"the group {_group_name(number)}", f"setfacl -x g:{number} {place}"

    def _trusted_users(self) -> Collection[int]:
        return {0, os.geteuid(), *([self.account.uid] if self.account is not None else [])}

    def _trusted_groups(self) -> Collection[int]:
        trusted = {0}
        if self._group is not None:
            trusted.add(self._group)
        if self.account is not None:
            trusted.add(self.account.gid)
        # One's own group is one's own only where each user has a group of that user's name.
        if _group_name(os.getegid()) == _user_name(os.geteuid()):
            trusted.add(os.getegid())
        return trusted

    # --- the socket --------------------------------------------------------------------------

    def bind(self, make: Callable[[], object], undo: Callable[[], object]) -> None:
        """Have a unix socket made, to which at no time anybody can connect but this process' user
        and those it is meant for.

        Args:
            make: makes it, at its path.
            undo: takes it away.

        Raises:
            UnsafeError: the directory is none for it.
        """
        self.check_directory()
        before = os.umask(0o177)
        try:
            make()
        finally:
            os.umask(before)
        try:
            self._give_access()
        except BaseException:
            undo()
            raise
        if self._mode & stat.S_IWOTH:
            warn(f"mode {self._mode:04o}: every user of this machine can connect to {self.where}")

    def _give_access(self) -> None:
        # By descriptor where there are such: whoever owns the directory could exchange the path.
        flags = getattr(os, "O_PATH", 0) | os.O_NOFOLLOW
        descriptor = os.open(self.where, flags) if hasattr(os, "O_PATH") else -1
        link = f"/proc/self/fd/{descriptor}"
        target = link if descriptor >= 0 and os.path.exists(link) else self.where
        try:
            status = os.stat(target)
            if (
                not stat.S_ISSOCK(status.st_mode)
                or (status.st_uid, status.st_nlink) != (os.geteuid(), 1)
                or stat.S_IMODE(status.st_mode) & ~0o600
            ):
                raise UnsafeError(f"{self.where} was replaced while it was opened")
            # What the directory's default list gave it would be in force again with the new mode.
            _acl.remove(target)
            self._give_away(target)
            os.chmod(target, self._mode)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _give_away(self, target: str) -> None:
        uid = -1 if self.account is None else self.account.uid
        gid = -1 if self.account is None else self.account.gid
        gid = gid if self._group is None else self._group
        if (uid, gid) == (-1, -1):
            return
        try:
            os.chown(target, uid, gid)
        except PermissionError as exc:
            raise milter.error(
                f"cannot give the socket {self.where} to the group {_group_name(gid)}: only root "
                "can choose any, others one that they are in"
            ) from exc

    # --- what is said of it --------------------------------------------------------------------

    def _warn(self) -> None:
        if self.kind in ("inet", "inet6", "fd"):
            self._warn_of_tcp()
        elif not self._asked:
            try:
                self.check_directory()
            except UnsafeError as exc:
                warn(str(exc))
        if self.kind == "unix":
            self._warn_of_remains()
        if os.geteuid() == 0:
            warn("the filter runs as root: give it a user of its own (user=, --user)")

    def _warn_of_remains(self) -> None:
        directory = os.path.dirname(self.where) or "."
        if not os.access(directory, os.W_OK | os.X_OK):
            user = _user_name(os.geteuid())
            name = os.path.splitext(os.path.basename(self.where))[0]
            warn(
                f"the socket {self.where} will be left behind when the filter stops, as {user} may "
                f"not write to {directory}: use a directory of the filter's own, such as: "
                f"install -d -o {user} -m 0750 {os.path.join(directory, name)}"
            )

    def _warn_of_tcp(self) -> None:
        local = _is_local(self.kind, self.where)
        if local is None:
            return
        warn(
            "the milter protocol has no authentication and no encryption: "
            f"{'every user of this machine' if local else 'whoever reaches the port'} can use "
            f"this filter on {self.conn}"
            f"{'' if local else '; let a firewall pass the MTA only'}",
            "info" if local else "warning",
        )


class Account:
    """A user to become.

    Args:
        user: name or number.
        group: name or number; by default that of the user.

    Raises:
        milter.InvalidArgument: there is none, or this process cannot become that user.
    """

    def __init__(self, user: str | int, group: str | int | None = None) -> None:
        entry = _find_user(user)
        if entry is None and group is None:
            raise milter.InvalidArgument(
                f"user {user!r} is not in the system's list of users: say which group= it has"
            )
        self._known = entry is not None
        self.name = str(user) if entry is None else entry.pw_name
        self.uid = int(user) if entry is None else entry.pw_uid
        if group is not None:
            self.gid = _find_group("group", group)
        elif entry is not None:
            self.gid = entry.pw_gid
        if os.geteuid() == 0:
            return
        if self.uid != os.geteuid():
            raise milter.InvalidArgument(f"user {user!r}: only root can become another user")
        if group is not None and self.gid != os.getegid():
            raise milter.InvalidArgument(f"group {group!r}: only root can choose its group")

    def become(self) -> None:
        """Give root up for good, and make sure of it.

        Raises:
            UnsafeError: it failed, or the way back is open.
        """
        if os.geteuid() != 0:
            return
        try:
            if self._known:
                os.initgroups(self.name, self.gid)
            else:
                os.setgroups([self.gid])
            if hasattr(os, "setresuid"):
                os.setresgid(self.gid, self.gid, self.gid)
                os.setresuid(self.uid, self.uid, self.uid)
            else:
                os.setgid(self.gid)
                os.setuid(self.uid)
        except OSError as exc:
            raise UnsafeError(
                f"cannot become user {self.name!r}: {exc.strerror}; the filter does not go on as "
                "root"
            ) from exc
        if self.uid != 0 and self._is_root_still():
            raise UnsafeError(
                f"became user {self.name!r}, but the way back to root is open: refused"
            )

    def _is_root_still(self) -> bool:
        users = os.getresuid() if hasattr(os, "getresuid") else (os.getuid(), os.geteuid())
        groups = os.getresgid() if hasattr(os, "getresgid") else (os.getgid(), os.getegid())
        return set(users) != {self.uid} or set(groups) != {self.gid} or _can_be_root()


def _can_be_root() -> bool:
    for attempt in (os.setuid, os.seteuid):
        try:
            attempt(0)
        except OSError:
            continue
        return True
    return False


def shut() -> None:
    """Undo opening: ``main`` after ``stop`` removes the socket and returns."""
    milter.stop()
    milter.main()


def warn(message: str, level: str = "warning") -> None:
    """Log it, without loading ``logging`` where the program does not use it.

    Args:
        message: one line.
        level: of the record, by the name of a logger's method.
    """
    if "logging" in sys.modules:
        from ._logging import logger

        getattr(logger(), level)("%s", message)
    elif level == "warning":
        # What logging does as long as nobody has set it up.
        sys.stderr.write(f"{message}\n")  # in one piece, also where it is not buffered


# --- small parts -------------------------------------------------------------------------------


def _take_apart(conn: str) -> tuple[str, str]:
    """The kind of a socket, and its path, its host (empty for all) or its descriptor."""
    try:
        kind, where, _ = milter._parse_socket(conn)
    except ValueError as exc:
        raise milter.InvalidArgument(f"socket {conn!r}: {exc}") from None
    return kind, "" if where is None else str(where)


def _checked_mode(mode: object) -> int:
    if isinstance(mode, bool) or not isinstance(mode, int):
        raise TypeError(f"socket_mode must be an int such as 0o660, not {mode!r}")
    if not 0 <= mode <= 0o777:
        hint = f" (0o{mode} in octal?)" if set(str(mode)) <= set("01234567") else ""
        raise milter.InvalidArgument(f"socket_mode must be from 0 to 0o777, not {mode!r}{hint}")
    return mode


def _find_user(user: str | int) -> pwd.struct_passwd | None:
    """The entry; None for a number that has none."""
    if isinstance(user, bool) or not isinstance(user, (str, int)):
        raise TypeError(f"user must be a name or a number, not {user!r}")
    try:
        return pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
    except (KeyError, ValueError, OverflowError):
        if isinstance(user, int) and 0 <= user < 2**32 - 1:
            return None
        raise milter.InvalidArgument(f"user {user!r}: there is no such user") from None


def _find_group(argument: str, group: str | int) -> int:
    if isinstance(group, bool) or not isinstance(group, (str, int)):
        raise TypeError(f"{argument} must be a name or a number, not {group!r}")
    if isinstance(group, int):
        if not 0 <= group < 2**32 - 1:
            raise milter.InvalidArgument(f"{argument} {group!r}: there is no such group")
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise milter.InvalidArgument(f"{argument} {group!r}: there is no such group") from None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


def _described(place: str, status: os.stat_result) -> str:
    owner = f"{_user_name(status.st_uid)}:{_group_name(status.st_gid)}"
    return f"{place} (owner {owner}, mode {stat.S_IMODE(status.st_mode):04o})"


def _is_local(kind: str, where: str) -> bool | None:
    """Whether only this machine reaches the listener; None where it is no TCP listener."""
    import socket

    if kind == "fd":
        with socket.socket(fileno=os.dup(int(where))) as inherited:
            if inherited.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            return _is_loopback(inherited.getsockname()[0])
    if not where:
        return False
    family = socket.AF_INET6 if kind == "inet6" else socket.AF_INET
    try:
        found = socket.getaddrinfo(where, None, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for what cannot be a name in the DNS
        return False
    return all(_is_loopback(str(each[4][0])) for each in found)


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.removeprefix("::ffff:").startswith("127.")
