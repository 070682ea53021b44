"""Access maps: which keys are tried in which order, and which kinds of files can be read."""

from __future__ import annotations

import dbm.dumb
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from Milter import _dbmfile, policy
from Milter.policy import MTAPolicy


class Map(dict):
    """A map that remembers what was asked for, and is not closed twice."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked, self.closed = [], 0

    def get(self, key):
        self.asked.append(key)
        return super().get(key)

    def close(self):
        self.closed += 1


def conf(**settings):
    return SimpleNamespace(**{"access_file": "/nowhere", **settings})


@pytest.fixture
def use(monkeypatch):
    """Let policies read a map in memory."""

    def use(*args):
        found = Map(*args)
        monkeypatch.setattr(policy, "dbmopen", lambda name, mode: found)
        return found

    return use


def look_up(found, sender, prefix="SPF-Fail", **settings):
    with MTAPolicy(sender, conf(**settings)) as p:
        value = p.getPolicy(prefix)
    return value


def test_order_of_keys(use):
    found = use()
    assert look_up(found, "user@a.b.example.com", "spf") is None
    assert found.asked == [
        b"spf:user@a.b.example.com",
        b"spf:a.b.example.com",
        b"spf:.b.example.com",
        b"spf:.example.com",
        b"spf:.com",
        b"spf:",
        b"spf",
    ]
    assert found.closed == 1


@pytest.mark.parametrize("sender", ["<user@a.example.com.>", "user@a.example.com."])
def test_a_final_dot_changes_nothing(use, sender):
    assert look_up(use({b"SPF-Fail:user@a.example.com": b"REJECT"}), sender) == "REJECT"
    assert look_up(use({b"SPF-Fail:a.example.com": b"REJECT"}), sender) == "REJECT"
    assert look_up(use({b"SPF-Fail:.example.com": b"REJECT"}), sender) == "REJECT"


def test_each_key_is_also_tried_as_makemap_folds_it(use):
    found = use()
    look_up(found, "User@Ex.com", "SPF")
    assert found.asked == [
        b"SPF:User@Ex.com",
        b"spf:user@ex.com",
        b"SPF:User@ex.com",
        b"SPF:ex.com",
        b"spf:ex.com",
        b"SPF:.com",
        b"spf:.com",
        b"SPF:",
        b"spf:",
        b"SPF",
        b"spf",
    ]


ENTRIES = {
    b"SPF-Fail:user@example.com": b"1",
    b"spf-fail:example.com": b"2",
    b"spf-fail:.example.com": b"3",
    b"SPF-Fail:.com": b"4",
    b"SPF-Fail:": b"5",
    b"bare": b"6",
}


@pytest.mark.parametrize(
    ("sender", "prefix", "value"),
    [
        ("user@example.com", "SPF-Fail", "1"),
        ("<user@example.com>", "SPF-Fail", "1"),
        ("user@EXAMPLE.com", "SPF-Fail", "1"),
        ("other@example.com", "SPF-Fail", "2"),
        ('"a@b"@example.com', "SPF-Fail", "2"),
        ("x@sub.example.com", "SPF-Fail", "3"),
        ("x@deep.sub.example.com", "SPF-Fail", "3"),
        ("x@notexample.com", "SPF-Fail", "4"),
        ("x@example.org", "SPF-Fail", "5"),
        ("local", "SPF-Fail", "5"),
        ("", "SPF-Fail", "5"),
        ("<>", "SPF-Fail", "5"),
        (None, "SPF-Fail", "5"),
        ("x@", "SPF-Fail", "5"),
        ("x@example.com", "bare", "6"),
        ("x@example.com", "SPF-Pass", None),
    ],
)
def test_most_specific_entry_wins(use, sender, prefix, value):
    assert look_up(use(ENTRIES), sender, prefix) == value


def test_tags_without_colon(use):
    found = use({b"SPF!example.com": b"OK"})
    assert look_up(found, "u@example.com", "SPF", access_file_colon=False) == "OK"
    assert look_up(found, "u@example.com", "SPF", access_file_colon=True) is None


def test_maps_with_null_bytes(use):
    found = use({b"spf:example.com\0": b"OK\0"})
    assert look_up(found, "u@example.com", "spf", access_file_nulls=True) == "OK"
    assert look_up(found, "u@example.com", "spf", access_file_nulls=False) is None
    assert look_up(use({b"spf:example.com": b"OK\0"}), "u@example.com", "spf") == "OK"


def test_hostile_senders(use):
    found = use()
    for sender in ("\udcff\0@x.com", "\ud800@x.com", "@", "a@" + "x." * 5000, "." * 300, "@..x"):
        assert look_up(found, sender) is None
    assert len(found.asked) < 300


def test_value_that_is_no_utf8(use):
    assert look_up(use({b"spf": b"\xff"}), "u@x.com", "spf") == "\udcff"


def test_no_map_no_policy():
    with MTAPolicy("u@x.com", conf(access_file=None)) as p:
        assert p.getPolicy("x") is None


def test_not_open_no_policy(use):
    found = use({b"x": b"y"})
    p = MTAPolicy("u@x.com", conf())
    assert p.getPolicy("x") is None
    with p:
        assert p.getPolicy("x") == "y"
        p.close()
        assert p.getPolicy("x") is None
    p.close()
    assert found.closed == 1


def test_closed_when_an_exception_passes(use):
    found = use()
    with pytest.raises(ZeroDivisionError), MTAPolicy("u@x.com", conf()):
        1 / 0  # noqa: B018
    assert found.closed == 1


# Files


def dumb(path):
    return dbm.dumb.open(path, "n")


def ndbm(path):
    return pytest.importorskip(
        "dbm.ndbm", exc_type=ImportError, reason="this Python has none"
    ).open(path, "n")


def gdbm(path):
    return pytest.importorskip("dbm.gnu", exc_type=ImportError, reason="this Python has none").open(
        path, "n"
    )


def sqlite(path):
    return pytest.importorskip(
        "dbm.sqlite3", exc_type=ImportError, reason="new in Python 3.13"
    ).open(path, "n")


def berkeley_db(path, kind="DB_HASH"):
    db = pytest.importorskip("berkeleydb", reason="extra policy is not installed").db
    handle = db.DB()
    handle.open(path + ".db", dbtype=getattr(db, kind), flags=db.DB_CREATE)
    return handle


def berkeley_btree(path):
    return berkeley_db(path, "DB_BTREE")


@pytest.mark.parametrize("make", [dumb, ndbm, gdbm, sqlite, berkeley_db, berkeley_btree])
def test_kinds_of_files(tmp_path, make):
    # The source of the map, which must not be taken for the map.
    path = str(tmp_path / "access")
    made = make(path)
    made[b"spf:example.com"] = b"REJECT"
    made.close()
    for access_file in (path, tmp_path / "access"):
        with MTAPolicy("u@example.com", conf(), access_file) as p:
            assert p.getPolicy("SPF") == "REJECT"
    reader = policy.dbmopen(path)
    assert list(reader.keys()) == [b"spf:example.com"]
    reader.close()


@pytest.mark.parametrize("make", [berkeley_db, berkeley_btree])
def test_map_with_its_source_beside_it(tmp_path, make):
    path = str(tmp_path / "access")
    made = make(path)
    made[b"spf"] = b"OK"
    made.close()
    (tmp_path / "access").write_text("spf\tNOT\n")
    for access_file in (path, path + ".db"):
        with MTAPolicy("u@example.com", conf(access_file=access_file)) as p:
            assert p.getPolicy("spf") == "OK"


def test_damaged_berkeley_db(tmp_path):
    path = tmp_path / "access.db"
    berkeley_db(str(tmp_path / "access")).close()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=r"access\.db"):
        policy.dbmopen(path)


def test_errors_of_berkeley_db_are_os_errors(tmp_path):
    berkeley_db(str(tmp_path / "access")).close()
    reader = policy.dbmopen(tmp_path / "access.db")
    reader.close()
    with pytest.raises(OSError, match=r"access\.db"):
        reader.get(b"x")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError), MTAPolicy("u@x", conf(access_file=tmp_path / "no")):
        pass


def test_file_of_no_known_kind(tmp_path):
    path = tmp_path / "access"
    path.write_text("spf:example.com REJECT\n" * 10)
    with pytest.raises(ValueError, match="no database of a kind"):
        policy.dbmopen(path)


def test_maps_are_only_read(tmp_path):
    with pytest.raises(ValueError, match="mode must be 'r', not 'w'"):
        policy.dbmopen(tmp_path / "access", "w")


HASH_HEADER = bytes(12) + (0x061561).to_bytes(4, sys.byteorder) + bytes(4080)


def test_without_berkeleydb_the_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "access").write_bytes(HASH_HEADER)
    monkeypatch.setitem(sys.modules, "berkeleydb", None)
    with pytest.raises(
        ImportError, match=r"access: .* pip install berkeleydb \(.*libdb-dev"
    ) as caught:
        policy.dbmopen(tmp_path / "access")
    assert caught.value.name == "berkeleydb"


@pytest.mark.parametrize("library", ["Berkeley DB", "GNU gdbm", None])
def test_without_berkeleydb_ndbm_may_do(tmp_path, monkeypatch, library):
    (tmp_path / "access.db").write_bytes(HASH_HEADER)
    monkeypatch.setitem(sys.modules, "berkeleydb", None)
    opened = []
    stand_in = library and SimpleNamespace(library=library, open=lambda *a: opened.append(a))
    monkeypatch.setitem(sys.modules, "dbm.ndbm", stand_in)
    if library == "Berkeley DB":
        policy.dbmopen(tmp_path / "access")
        assert opened == [(str(tmp_path / "access"), "r")]
    else:
        with pytest.raises(ImportError, match="pip install berkeleydb"):
            policy.dbmopen(tmp_path / "access")


def test_ndbm_reads_what_berkeleydb_wrote(tmp_path, monkeypatch):
    pytest.importorskip("dbm.ndbm", exc_type=ImportError, reason="this Python has none")
    made = berkeley_db(str(tmp_path / "access"))
    made[b"spf"] = b"OK"
    made.close()
    monkeypatch.setitem(sys.modules, "berkeleydb", None)
    with MTAPolicy("u@x.com", conf(access_file=tmp_path / "access.db")) as p:
        assert p.getPolicy("spf") == "OK"


def test_kind_that_this_python_cannot_read(tmp_path, monkeypatch):
    (tmp_path / "access").write_bytes(b"\xce\x9a\x57\x13" + bytes(100))
    monkeypatch.setitem(sys.modules, "dbm.gnu", None)
    with pytest.raises(ImportError, match="built without the module that reads it"):
        policy.dbmopen(tmp_path / "access")


def test_files_of(tmp_path):
    path = str(tmp_path / "access")
    assert _dbmfile.files_of(path) == []
    dumb(path).close()
    assert sorted(_dbmfile.files_of(path)) == sorted(map(str, tmp_path.iterdir()))
    (tmp_path / "access.db").write_bytes(HASH_HEADER)
    assert _dbmfile.files_of(path) == [path + ".db"]
    (tmp_path / "access").touch()
    assert _dbmfile.files_of(path) == [path]


def test_importing_loads_no_berkeleydb():
    code = "import sys, Milter.policy; print('berkeleydb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"


def mta_program(name):
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    pytest.importorskip("berkeleydb", reason="extra policy is not installed")
    return path


def test_map_of_sendmail_itself(tmp_path):
    path = tmp_path / "access"
    command = [mta_program("makemap"), "-C", os.devnull, "hash", path]
    subprocess.run(command, input=b"SPF-Fail:example.com REJECT\n", check=True, timeout=60)
    with MTAPolicy("u@example.com", conf(access_file=path)) as p:
        assert p.getPolicy("SPF-Fail") == "REJECT"


def test_map_of_postfix(tmp_path):
    path = tmp_path / "access"
    path.write_text("SPF-Fail:example.com REJECT\n")
    (tmp_path / "main.cf").touch()
    command = [mta_program("postmap"), "-c", tmp_path, f"hash:{path}"]
    subprocess.run(command, check=True, timeout=60)
    with MTAPolicy("u@example.com", conf(access_file=path, access_file_nulls=True)) as p:
        assert p.getPolicy("SPF-Fail") == "REJECT"


A, U = "xn--bcher-kva.example", "b\u00fccher.example"


@pytest.mark.parametrize(
    "sender", [A, U, A.upper(), U.upper(), A + ".", U + ".", "b\u00fccher\u3002example"]
)
@pytest.mark.parametrize("entry", [A, U])
def test_forms_of_a_domain_are_one(use, sender, entry):
    found = use({f"spf:{entry}".encode(): b"1", f"spf:joe@{entry}".encode(): b"2"})
    assert look_up(found, f"other@{sender}", "SPF") == "1"
    assert look_up(found, f"<joe@{sender}>", "SPF") == "2"
    assert look_up(found, f"joe@mx.{sender}", "SPF") is None
    above = use({f"spf:.{entry}".encode(): b"3"})
    assert look_up(above, f"other@mx.{sender}", "SPF") == "3"
    assert look_up(above, f"other@mx.deep.{sender}", "SPF") == "3"
    assert look_up(above, f"other@{sender}", "SPF") is None


def test_no_key_is_asked_for_twice(use):
    found = use()
    look_up(found, f"Joe@mx.{U}")
    assert len(found.asked) == len(set(found.asked))
    assert found.asked.index(f"SPF-Fail:Joe@mx.{A}".encode()) < found.asked.index(
        f"SPF-Fail:.{U}".encode()
    )


@pytest.mark.parametrize(
    "domain", ["xn--\u00fc", "a..b", "\udcff.x", "\ud800", "\u00fc" * 9999, "."]
)
def test_what_is_no_domain_has_no_policy(use, domain):
    assert look_up(use(), f"joe@{domain}") is None
