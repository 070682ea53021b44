"""A filter for test_access_log.py: the sender's local part says at which stage it answers what."""

from __future__ import annotations

from typing import Any

import Milter

_ANSWERS = {"reject": Milter.REJECT, "later": Milter.TEMPFAIL, "drop": Milter.DISCARD}


class Staged(Milter.Base):
    def connect(self, *args: Any) -> int:
        self.plan = ""
        return Milter.CONTINUE

    def _at(self, stage: str) -> int:
        word, _, where = self.plan.partition("-")
        if where != stage:
            return Milter.CONTINUE
        if word == "reject":
            self.setreply("550", "5.7.1", f"not at {stage}")
        return _ANSWERS[word]

    def hello(self, name: str) -> int:
        return Milter.REJECT if name == "rejected.example" else Milter.CONTINUE

    def envfrom(self, sender: str, *params: str) -> int:
        self.plan = sender.strip("<>").partition("@")[0]
        return self._at("mail")

    def envrcpt(self, to: str, *params: str) -> int:
        if "gone" in to:
            self.setreply("550", "5.1.1", "no such user")
            return Milter.REJECT
        return self._at("rcpt")

    def data(self) -> int:
        return self._at("data")

    def header(self, name: str, value: str) -> int:
        return self._at("header")

    def eoh(self) -> int:
        return self._at("eoh")

    def body(self, chunk: bytes) -> int:
        return self._at("body")

    def eom(self) -> int:
        self.addheader("X-Seen", "yes")
        self.delrcpt("<copy@example.org>")
        return self._at("eom")
