"""Milter.dynip.is_dynip: names as they are seen in PTR records, both ways."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Milter.dynip import is_dynip


@pytest.mark.parametrize("host", [None, "", " ", ".", "unknown", "[69.208.201.177]"])
@pytest.mark.parametrize("addr", ["69.208.201.177", "2001:db8::1", None, ""])
def test_no_name_is_dynamic(host: str | None, addr: str | None) -> None:
    assert is_dynip(host, addr)


@pytest.mark.parametrize(
    ("host", "addr"),
    [
        # the address itself in place of a name
        ("69.208.201.177", "69.208.201.177"),
        ("2001:db8::1", "2001:db8::1"),
        ("[IPv6:2001:db8::1]", "2001:db8::1"),
        # four octets
        ("adsl-69-208-201-177.dsl.emhril.example.net", "69.208.201.177"),
        ("c-24-3-80-117.hsd1.pa.example.net", "24.3.80.117"),
        ("ec2-54-12-200-7.compute-1.example.com", "54.12.200.7"),
        ("static-71-123-9-45.example.net", "71.123.9.45"),
        ("69.208.201.177.rev.example.pl", "69.208.201.177"),
        ("177.201.208.69.example.br", "69.208.201.177"),
        ("host177-201-208-69.example.it", "69.208.201.177"),
        ("201-177.208-69.users.example.be", "69.208.201.177"),
        ("host69x208x201x177.example.jp", "69.208.201.177"),
        ("u177.p201.net208.cl69.example.com", "69.208.201.177"),
        ("069-208-201-177.res.example.com", "69.208.201.177"),
        ("MAIL-69-208-201-177.EXAMPLE.NET.", "69.208.201.177"),
        # three octets, two octets
        ("bb-208-201-177.example.sg", "69.208.201.177"),
        ("177.201.208.example.sg", "69.208.201.177"),
        ("pc201-177.example.org", "69.208.201.177"),
        ("177-201.example.org", "69.208.201.177"),
        # no mail server's name excuses more than two octets, or a line
        ("a208-201-177.smtp-out.example.org", "69.208.201.177"),
        ("a69-208-201-177.mailgun.net", "69.208.201.177"),
        ("a201-177.dsl.smtp.example.org", "69.208.201.177"),
        ("m201-177.pool.mailgun.net", "69.208.201.177"),
        ("a201-177.example.mail", "69.208.201.177"),
        ("a201-177.gridmail-less.example.org", "69.208.201.177"),
        # run together, one number, hexadecimal
        ("ip069208201177.example.net", "69.208.201.177"),
        ("p177201208069.example.net", "69.208.201.177"),
        ("ip69208201177.example.net", "69.208.201.177"),
        ("1171311025.example.net", "69.208.201.177"),
        ("p45D0C9B1.dip.example.de", "69.208.201.177"),
        ("b1c9d045.virtua.example.br", "69.208.201.177"),
        ("ip-45-d0-c9-b1.example.net", "69.208.201.177"),
        ("h-b1.c9.d0.45.example.net", "69.208.201.177"),
        ("mail.45d0c9b1.example.net", "69.208.201.177"),
        # an IPv4-mapped address is judged as the IPv4 address
        ("adsl-69-208-201-177.example.net", "::ffff:69.208.201.177"),
        # IPv6
        ("2001-db8-1-2--77.example.net", "2001:db8:1:2::77"),
        ("2001-0db8-0001-0002-0000-0000-0000-0077.example.net", "2001:db8:1:2::77"),
        ("2001-db8-1-2-0-0-0-77.example.net", "2001:db8:1:2::77"),
        ("20010db8000100020000000000000077.example.net", "2001:db8:1:2::77"),
        (
            "7.7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.0.0.0.1.0.0.0.8.b.d.0.1.0.0.2.example.net",
            "2001:db8:1:2::77",
        ),
        ("host-0221-5aff-fe01-0203.example.net", "2001:db8:1:2:221:5aff:fe01:203"),
        ("p02215afffe010203.example.net", "2001:db8:1:2:221:5aff:fe01:203"),
        ("2001-db8--1.example.net", "2001:db8::1%eth0"),
        # words
        ("pool.example.net", "69.208.201.177"),
        ("dialup-12.example.net", "69.208.201.177"),
        ("ppp42.example.net", "69.208.201.177"),
        ("foo.adsl.example.net", "69.208.201.177"),
        ("foo.vdsl2.example.net", "69.208.201.177"),
        ("a1.cable.example.net", "69.208.201.177"),
        ("cablemodem9.example.net", "69.208.201.177"),
        ("dhcp-office.example.co.uk", "69.208.201.177"),
        ("x7.dyn.example.com", "69.208.201.177"),
        ("x7.dynamic.example.com", "2001:db8::1"),
        ("cpe-x.example.com", "not an address"),
        ("home.ftth.example.com", None),
    ],
)
def test_dynamic(host: str, addr: str | None) -> None:
    assert is_dynip(host, addr)


@pytest.mark.parametrize(
    ("host", "addr"),
    [
        ("mail.example.com", "69.208.201.177"),
        ("post3.example.com", "69.60.99.112"),
        ("smtp1-g21.example.fr", "212.27.42.1"),
        ("mx3-4.example.com", "69.208.3.4"),
        ("mail-out-201-177.example.com", "69.208.201.177"),
        ("a11-22.smtp-out.amazonses.com", "54.240.11.22"),
        ("a1-135.smtp-out.eu-west-1.amazonses.com", "54.240.1.135"),
        ("b201-177.mta.example.co.uk", "69.208.201.177"),
        ("x201.177.outbound-mail.example.net", "69.208.201.177"),
        ("m43-7.mailgun.net", "69.72.43.7"),
        ("mail-201-177.example.com", "69.208.201.177"),
        ("o201-177.sparkpostmail.com", "69.208.201.177"),
        ("example.com", "1.2.3.4"),
        ("localhost", "127.0.0.1"),
        ("web177.example.com", "69.208.201.177"),
        ("a201.b177.example.com", "69.208.201.177"),
        ("v2020-69.example.com", "69.208.20.20"),
        ("o1678912345.mail.example.net", "167.89.12.34"),
        ("server.cablecom.example", "1.2.3.4"),
        ("mail.dsl.net", "9.8.7.6"),
        ("www.pool.co.uk", "9.8.7.6"),
        ("dsl.net", "9.8.7.6"),
        ("carpool.example.com", "9.8.7.6"),
        ("smtp.cable.example.net", "9.8.7.6"),
        ("mta7.dynamic.example.com", "9.8.7.6"),
        ("static.adsl.example.net", "9.8.7.6"),
        ("dsl-fixed7.example.net", "9.8.7.6"),
        ("mail.example.com", "2001:db8::1"),
        ("b1.example.com", "2001:db8:1:2::b1"),
        ("mail.example.com", None),
        ("mail.example.com", ""),
    ],
)
def test_a_name_of_its_own(host: str, addr: str | None) -> None:
    assert not is_dynip(host, addr)


@given(st.text(), st.text())
def test_any_text(host: str, addr: str) -> None:
    assert is_dynip(host, addr) in (True, False)


@given(st.ip_addresses(v=4), st.sampled_from(["-", ".", "_"]), st.booleans())
def test_any_ipv4_address_in_a_name(ip: object, sep: str, backwards: bool) -> None:
    octets = str(ip).split(".")
    name = sep.join(octets[::-1] if backwards else octets)
    assert is_dynip(f"host{name}.example.net", str(ip))


@given(st.ip_addresses(v=6).filter(lambda ip: not ip.ipv4_mapped))
def test_any_ipv6_address_in_a_name(ip: ipaddress.IPv6Address) -> None:
    name = ip.exploded.replace(":", "-")
    assert is_dynip(f"h{name}.example.net", str(ip))
