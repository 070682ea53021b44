"""An application's own version of runmilter on the low-level module, with its own lambdas."""

import sys

import milter

import Milter


class Own(Milter.Base):
    def connect(self, hostname, family, hostaddr):
        print("connect", hostname, family, hostaddr, flush=True)
        return Milter.CONTINUE

    def envfrom(self, f, *params):
        print("envfrom", f, params, Milter.param2dict(params), flush=True)
        return Milter.CONTINUE

    def envrcpt(self, to, *params):
        print("envrcpt", to, params, flush=True)
        return Milter.CONTINUE

    def header(self, field, value):
        print("header", field, value, flush=True)
        return Milter.CONTINUE

    def body(self, blk):
        print("body", blk, flush=True)
        return Milter.CONTINUE

    def eom(self):
        self.addheader("X-Own", "yes")
        return Milter.ACCEPT

    def close(self):
        print("close", flush=True)
        return Milter.CONTINUE


def run(name, socketname, timeout):
    milter.set_connect_callback(Milter.connect_callback)
    milter.set_helo_callback(lambda ctx, host: ctx.getpriv().hello(host))
    milter.set_envfrom_callback(
        lambda ctx, *args: ctx.getpriv().envfrom(*[a.decode() for a in args])
    )
    milter.set_envrcpt_callback(
        lambda ctx, *args: ctx.getpriv().envrcpt(*[a.decode() for a in args])
    )
    milter.set_header_callback(lambda ctx, f, v: ctx.getpriv().header(f, v.decode()))
    milter.set_eoh_callback(lambda ctx: ctx.getpriv().eoh())
    milter.set_body_callback(lambda ctx, chunk: ctx.getpriv().body(chunk))
    milter.set_eom_callback(lambda ctx: ctx.getpriv().eom())
    milter.set_abort_callback(lambda ctx: ctx.getpriv().abort())
    milter.set_close_callback(Milter.close_callback)
    milter.setconn(socketname)
    if timeout > 0:
        milter.settimeout(timeout)
    negotiate = Milter.negotiate_callback if "negotiate" in sys.argv else None
    milter.register(
        name,
        data=lambda ctx: ctx.getpriv().data(),
        unknown=lambda ctx, cmd: ctx.getpriv().unknown(cmd),
        negotiate=negotiate,
    )
    milter.main()


Milter.factory = Own
milter.set_flags(milter.CURR_ACTS)
run("own", sys.argv[1], 240)
print("after run", flush=True)
