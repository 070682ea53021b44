"""A filter as many are written: everything by `from Milter import *`."""

from Milter import *  # noqa: F403

EXTRA = {"os", "re", "sys", "threading"} & set(globals())

import sys  # noqa: E402

import Milter  # noqa: E402 - the package again: the name is also that of a class in it


class StarMilter(Base):  # noqa: F405
    @noreply  # noqa: F405
    def connect(self, hostname, family, hostaddr):
        self.id = uniqueID()  # noqa: F405
        return CONTINUE  # noqa: F405

    def eom(self):
        self.addheader("X-Id", str(self.id))
        self.addheader("X-Extra-Names", " ".join(sorted(EXTRA)) or "none")
        self.addheader("X-Same", str(error is Milter.error is milter.error))  # noqa: F405
        return ACCEPT  # noqa: F405


Milter.factory = StarMilter
set_flags(ADDHDRS)  # noqa: F405
runmilter("star", sys.argv[1], 240)  # noqa: F405
