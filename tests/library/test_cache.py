"""The address cache: expiry, fallback to domains, and the file that keeps the None entries."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from Milter import cache as module
from Milter.cache import AddrCache

DAY = 86400


def stamp(days_ago=0.0):
    return time.strftime(AddrCache.time_format, time.localtime(time.time() - days_ago * DAY))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.dat"


@pytest.fixture
def clock(monkeypatch):
    """Move the module's time by days."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(module.time, "time", lambda: real() + offset[0])

    def move(days):
        offset[0] += days * DAY

    return move


def test_results_without_regard_to_case():
    cache = AddrCache()
    cache["Some.One@Example.COM"] = (550, "no")
    assert cache["some.one@example.com"] == (550, "no")
    assert "SOME.ONE@EXAMPLE.COM" in cache
    assert len(cache) == 1


def test_missing_address():
    cache = AddrCache()
    with pytest.raises(KeyError, match=r"^'nobody@example\.com'$"):
        cache["nobody@example.com"]
    assert "nobody@example.com" not in cache
    assert not cache.has_key("nobody@example.com")
    assert not cache.has_precise_key("nobody@example.com")


def test_fallback_to_the_domain():
    cache = AddrCache()
    cache["Example.com"] = "domain"
    cache["user@example.com"] = "user"
    assert cache["user@example.com"] == "user"
    assert cache["other@EXAMPLE.com"] == "domain"
    assert cache['"a@b"@example.com'] == "domain"
    assert cache["other@example.com."] == "domain"
    assert cache.has_key("other@example.com")
    assert not cache.has_precise_key("other@example.com")
    assert cache.has_precise_key("user@example.com")
    assert "user@sub.example.com" not in cache
    with pytest.raises(KeyError):
        cache["x@"]
    with pytest.raises(KeyError):
        cache["x@."]


def test_a_sender_without_a_domain_is_one(path):
    """What the class warns of, and that what it advises helps."""
    cache = AddrCache(fname=path)
    for sender in ("example.com", "user@example.org"):
        if "@" in sender:
            cache[sender] = None
    assert "anyone@example.com" not in cache
    assert "anyone@example.org" not in cache
    cache["example.com"] = None
    assert "anyone@example.com" in cache


@pytest.mark.parametrize("nothing", ["", None])
def test_no_sender_is_no_key(nothing):
    cache = AddrCache()
    assert nothing not in cache
    with pytest.raises(KeyError):
        cache[nothing]


def test_only_str_is_an_address():
    with pytest.raises(TypeError, match="sender must be a str, not 5"):
        AddrCache()[5] = None


def test_not_iterable():
    with pytest.raises(TypeError):
        iter(AddrCache())


def test_expiry(clock):
    cache = AddrCache(renew=7)
    cache["a@b.com"] = 1
    clock(6.9)
    assert cache["a@b.com"] == 1
    clock(0.2)
    assert "a@b.com" not in cache
    assert not cache.has_precise_key("a@b.com")
    assert len(cache) == 0


def test_expired_address_falls_back(clock):
    cache = AddrCache(renew=7)
    cache["a@b.com"] = "user"
    clock(5)
    cache["b.com"] = "domain"
    clock(5)
    assert cache["a@b.com"] == "domain"


def test_permanent_entries_stay(clock):
    cache = AddrCache(renew=1)
    cache.addperm("a@b.com", "result")
    cache.addperm("c@d.com")
    clock(1000)
    assert cache["a@b.com"] == "result"
    assert cache["c@d.com"] is None


def test_expired_entries_do_not_pile_up(clock, monkeypatch):
    monkeypatch.setattr(module, "_PRUNE_FROM", 100)
    cache = AddrCache(renew=1)
    cache.addperm("kept@example.com", 1)
    for number in range(1000):
        cache[f"u{number}@example.com"] = 1
        clock(0.01)
    assert len(cache) < 250
    assert "kept@example.com" in cache
    assert "u999@example.com" in cache


@pytest.mark.parametrize("size", [1, 5, 400, 2000])
def test_strangers_cannot_fill_the_memory(clock, size):
    cache = AddrCache(max_entries=size)
    for number in range(10):
        cache.addperm(f"kept{number}@example.com", 1)
    for number in range(5000):
        cache[f"u{number}@example.com"] = number
        assert len(cache) <= size + 10
        if size > 1:
            assert cache[f"u{number}@example.com"] == number
        clock(1e-9)
    assert all(f"kept{number}@example.com" in cache for number in range(10))
    assert len(cache) >= 3 * size // 4
    assert "u0@example.com" not in cache


def test_nor_those_who_come_at_one_time():
    cache = AddrCache(max_entries=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: 1e9)
        for number in range(1000):
            cache[f"u{number}@example.com"] = 1
            assert len(cache) <= 100


@pytest.mark.parametrize("size", [0, -1])
def test_a_cache_of_nothing(size):
    with pytest.raises(ValueError, match="max_entries must be positive"):
        AddrCache(max_entries=size)


def test_only_none_goes_to_the_file(path):
    cache = AddrCache(fname=str(path))
    cache["Foo@Bar.com"] = None
    cache["x@y.com"] = 1
    cache.addperm("Perm@bar.com")
    cache.addperm("x@z.com", 2)
    first, second = path.read_text().splitlines()
    assert first.startswith("Foo@Bar.com 20")
    assert time.strptime(first.split(None, 1)[1], AddrCache.time_format)
    assert second == "Perm@bar.com"


def test_no_file_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AddrCache()["a@b.com"] = None
    assert not list(tmp_path.iterdir())


def test_entries_outlive_the_object(path):
    cache = AddrCache(fname=path)
    cache["Foo@Bar.com"] = None
    cache.addperm("perm@bar.com")
    cache["bytes\udcff@bar.com"] = None
    again = AddrCache()
    again.load(path)
    assert again["foo@bar.com"] is None
    assert "perm@bar.com" in again
    assert "bytes\udcff@bar.com" in again
    assert len(again) == 3
    assert os.listdir(path.parent) == ["cache.dat"]


def test_load_keeps_the_file_for_what_comes(path):
    cache = AddrCache()
    cache.load(path)
    assert not path.exists()
    cache["a@b.com"] = None
    assert path.read_text().startswith("a@b.com ")


def test_load_replaces_what_is_in_memory(path):
    path.write_text("a@b.com\n")
    cache = AddrCache()
    cache["c@d.com"] = 1
    cache.load(path)
    assert "c@d.com" not in cache
    assert "a@b.com" in cache


CONTENTS = (
    "manual@m.com\n"
    f"old@o.com {stamp(10)}\n"
    f"New@N.com {stamp(3)}\n"
    "bad@b.com 99foo\n"
    "\n"
    "# a comment\n"
    f"  lead@x.com  \t {stamp(3)}\n"
    "huge@x.com 99999999999Jan01 00:00:00 UTC\n"
    "Just.Dom   \n"
    f"new@n.com {stamp(9)}\n"
    f"last@x.com {stamp(1)}"
)


def test_load_drops_expired_and_unreadable_lines(path):
    path.write_text(CONTENTS)
    os.chmod(path, 0o640)
    cache = AddrCache(renew=7)
    cache.load(path)
    addresses = [line.split()[0] for line in path.read_text().splitlines()]
    assert addresses == ["manual@m.com", "New@N.com", "#", "lead@x.com", "Just.Dom", "last@x.com"]
    assert path.with_suffix(".dat.old").read_text() == CONTENTS
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(path.parent)) == ["cache.dat", "cache.dat.old"]
    assert len(cache) == 5
    assert all(key in cache for key in ("NEW@n.com", "lead@x.com", "x@just.dom", "last@x.com"))
    assert not any(key in cache for key in ("old@o.com", "bad@b.com", "huge@x.com", "#"))


def test_load_with_an_age_of_its_own(path):
    path.write_text(CONTENTS)
    cache = AddrCache(renew=7)
    cache.load(path, age=2)
    assert "new@n.com" not in cache
    assert "last@x.com" in cache
    cache.load(path.with_suffix(".dat.old"), age=20)
    assert cache.has_precise_key("new@n.com") is False, "older than the cache's own limit"


def test_loaded_entries_expire_by_their_stamp(path, clock):
    path.write_text(f"old@o.com {stamp(5)}\nmanual@m.com\n")
    cache = AddrCache(renew=7)
    cache.load(path)
    clock(3)
    assert "old@o.com" not in cache
    assert "manual@m.com" in cache


def test_load_while_the_lock_is_held_does_not_rewrite(path, caplog):
    path.write_text(CONTENTS)
    lock = path.with_suffix(".dat.lock")
    lock.touch()
    cache = AddrCache()
    cache.load(path)
    assert len(cache) == 5
    assert path.read_text() == CONTENTS
    assert "expired entries stay" in caplog.text
    assert lock.exists()


def test_failed_rewrite_leaves_the_file(path, monkeypatch):
    path.write_text(CONTENTS)

    def fail(self, lines):
        raise OSError(28, "No space left on device")

    class Full:
        writelines = fail

    real = module.PLock.lock
    monkeypatch.setattr(module.PLock, "lock", lambda self: (real(self), Full())[1])
    with pytest.raises(OSError, match="No space"):
        AddrCache().load(path)
    assert path.read_text() == CONTENTS
    assert os.listdir(path.parent) == ["cache.dat"]


@pytest.mark.parametrize(
    "address",
    [
        "a@b\nevil@c.com",
        "a b@c.com",
        "a\r@b.com",
        "a\u2028@b.com",
        "#a@b.com",
        " a@b.com",
        "\ud800@b.com",
        "",
    ],
)
def test_address_that_would_forge_lines_stays_in_memory(path, address, caplog):
    cache = AddrCache(fname=path)
    cache[address] = None
    cache.addperm(address)
    assert not path.exists()
    assert len(cache) == 1
    assert "is kept in memory" in caplog.text


def test_line_is_not_added_to_an_unfinished_one(path):
    path.write_text("manual@m.com")
    AddrCache(fname=path).addperm("a@b.com")
    assert path.read_text() == "manual@m.com\na@b.com\n"


def test_hostile_file_is_harmless(path):
    path.write_bytes(b"\xff\xfe@x.com\nnul\0l@x.com\n" + b"x" * 100_000 + b"\n\0\0\0\n")
    cache = AddrCache()
    cache.load(path)
    assert "\udcff\udcfe@x.com" in cache
    assert "nul\0l@x.com" in cache


def test_file_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(IsADirectoryError):
        AddrCache().load(tmp_path)
    cache = AddrCache(fname=tmp_path / "missing" / "cache.dat")
    with pytest.raises(FileNotFoundError):
        cache["a@b.com"] = None
    assert "a@b.com" in cache


def test_threads(path):
    cache = AddrCache(fname=path)

    def add(number):
        cache[f"u{number}@x.com"] = None
        assert cache[f"u{number}@x.com"] is None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(400)))
    assert len(path.read_text().splitlines()) == len(cache) == 400


APPEND = """
import sys
from Milter.cache import AddrCache
cache = AddrCache(fname=sys.argv[1])
for number in range(300):
    cache[f"{sys.argv[2]}-{number}@x.com"] = None
"""


def test_lines_added_during_a_rewrite_are_not_lost(path):
    path.touch()
    workers = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(path), name]) for name in ("a", "b")
    ]
    cache = AddrCache()
    rounds = 0
    while any(worker.poll() is None for worker in workers):
        with module._exclusive(str(path), os.O_RDWR | os.O_APPEND) as fd:
            os.write(fd, b"expired@x.com 2001Jan01 00:00:00 UTC\n")
        cache.load(path)
        rounds += 1
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert rounds
    cache.load(path)
    assert len(cache) == 600
    assert sum("x.com" in line for line in path.read_text().splitlines()) == 600


def test_file_that_is_replaced_while_it_is_opened(path, monkeypatch):
    path.write_text("old@x.com\n")
    real = module.fcntl.flock
    moves = [lambda: path.rename(path.with_suffix(".1")), lambda: path.write_text("new@x.com\n")]

    def flock(fd, how):
        if moves:
            moves.pop(0)()
        real(fd, how)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    AddrCache(fname=path).addperm("a@x.com")
    assert path.read_text() == "new@x.com\na@x.com\n"
    assert path.with_suffix(".1").read_text() == "old@x.com\n"


# Time zones


def in_zone(zone, code, path):
    """What a program prints that uses the cache on a host in another time zone."""
    code = f"import sys, time\nfrom Milter.cache import AddrCache\npath = sys.argv[1]\n{code}"
    env = dict(os.environ, TZ=zone)
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


WRITE = "AddrCache(fname=path)['a@x.com'] = None"
READ = """
cache = AddrCache()
cache.load(path)
entry = cache.cache.get("a@x.com")
print(entry and round(time.time() - entry.stored))
"""
ZONES = ["UTC", "Asia/Tokyo", "America/Sao_Paulo", "Europe/Berlin", "Asia/Kathmandu", "XYZ+11"]


@pytest.mark.parametrize("reader", ZONES)
@pytest.mark.parametrize("writer", ZONES)
def test_file_of_one_time_zone_is_read_in_any_other(path, writer, reader):
    in_zone(writer, WRITE, path)
    assert 0 <= int(in_zone(reader, READ, path)) < 60


@pytest.mark.parametrize("reader", ["UTC", "Asia/Tokyo", "Europe/Berlin"])
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026Jul01 12:00:00 UTC", 1782907200),
        ("2026Jul01 12:00:00 GMT", 1782907200),
        ("2026Jul01 14:00:00 CEST", 1782907200),
        ("2026Jul01 13:00:00 CET", 1782907200),
        ("2026Jul01 21:00:00 JST", 1782907200),
        ("2026Jul01 09:00:00 -03", 1782907200),
        ("2026Jul01 17:45:00 +0545", 1782907200),
        ("2026Jul01 17:45:00 +05:45", 1782907200),
        ("2026Jul01 08:30:00 NST", 1782907200),
        # The hour that there is twice.
        ("2026Oct25 02:30:00 CEST", 1792888200),
        ("2026Oct25 02:30:00 CET", 1792891800),
        # Nobody knows which: half a day more or less.
        ("2026Jul01 12:00:00 CST", 1782907200),
    ],
)
def test_time_stamps_of_any_zone(reader, text, seconds):
    code = f"import Milter.cache as m\nprint(m._parse_time({text!r}, AddrCache.time_format))"
    assert float(in_zone(reader, code, "-")) == seconds


@pytest.mark.parametrize(
    "text",
    ["2026Jul01 12:00:00", "2026Jul01 12:00:00 x", "2026Jul01 12:00:00 +5", "UTC", "+00", ""],
)
def test_what_is_no_time_stamp_stays_none(text):
    assert module._parse_time(text, AddrCache.time_format) is None


def test_time_format_of_ones_own_is_in_local_time(path):
    class Dated(AddrCache):
        time_format = "%Y-%m-%dT%H:%M:%S"

    Dated(fname=path)["a@x.com"] = None
    written = path.read_text().split()[1]
    seconds = time.mktime(time.strptime(written, Dated.time_format))
    assert abs(time.time() - seconds) < 60
    cache = Dated()
    cache.load(path)
    assert "a@x.com" in cache


# Forms of a domain


A, U = "xn--bcher-kva.example", "b\u00fccher.example"
FORMS = [A, U, A.upper(), U.upper(), A + ".", U + "."]


@pytest.mark.parametrize("key", FORMS)
@pytest.mark.parametrize("sender", FORMS)
def test_forms_of_a_domain_are_one(path, key, sender):
    cache = AddrCache(fname=path)
    cache[key] = None
    cache["Joe@" + key] = "1"
    assert "other@" + sender in cache
    assert sender in cache
    assert cache["joe@" + sender] == "1"
    assert cache.has_precise_key("JOE@" + sender)
    assert not cache.has_precise_key("other@" + sender)
    assert "x@sub." + sender not in cache
    again = AddrCache()
    again.load(path)
    assert "other@" + sender in again


@pytest.mark.parametrize(
    "domain", ["xn--\u00fc", "a..b", "\udcff.x", "\ud800", "\u00fc" * 9999, "."]
)
def test_what_is_no_domain_is_a_key_as_well(path, domain):
    cache = AddrCache(fname=path)
    assert "joe@" + domain not in cache
    cache["joe@" + domain] = None
    assert "JOE@" + domain in cache


def test_byte_order_mark(path):
    path.write_bytes(b"\xef\xbb\xbfa@x.com\nb@x.com\n")
    cache = AddrCache()
    cache.load(path)
    assert "a@x.com" in cache
    assert "b@x.com" in cache
    path.unlink()
    # What a sender writes must not become the mark, and then another's address.
    cache["\ufeffc@x.com"] = None
    assert "\ufeffc@x.com" in cache
    cache.load(path)
    assert "c@x.com" not in cache


def test_docs():
    assert doctest.testmod(module).failed == 0
