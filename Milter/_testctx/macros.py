"""The macros that an MTA has sent by a stage."""

from __future__ import annotations

from collections.abc import Sequence

import milter

from .._protocol import MACRO_CALLBACKS

#: Where sendmail and Postfix send common macros unless a list says otherwise.
USUAL_STAGES: dict[str, int] = {
    name: stage
    for stage, names in (
        (
            milter.M_CONNECT,
            (
                "j _ v {daemon_name} {daemon_addr} {daemon_port} {if_name} {if_addr}"
                " {client_addr} {client_name} {client_port} {client_ptr}"
            ),
        ),
        (milter.M_HELO, "{tls_version} {cipher} {cipher_bits} {cert_subject} {cert_issuer}"),
        (
            milter.M_ENVFROM,
            (
                "i {auth_type} {auth_authen} {auth_ssf} {auth_author}"
                " {mail_mailer} {mail_host} {mail_addr}"
            ),
        ),
        (milter.M_ENVRCPT, "{rcpt_mailer} {rcpt_host} {rcpt_addr}"),
    )
    for name in names.split()
}

#: The stages in the order in which a session reaches them.
STAGE_ORDER = (
    milter.M_CONNECT,
    milter.M_HELO,
    milter.M_ENVFROM,
    milter.M_ENVRCPT,
    milter.M_DATA,
    milter.M_EOH,
    milter.M_EOM,
)

#: The macro stage of each step; those without one see what the step before them saw.
STAGES = {"helo" if name == "hello" else name: stage for name, stage in MACRO_CALLBACKS.items()}

#: The callback that runs at a macro stage.
CALLBACKS_OF_STAGES = {stage: step for step, stage in STAGES.items()}


def macro_name(name: str) -> str:
    """A macro's name as libmilter compares it: braces around one letter do not count."""
    return name[1] if len(name) == 3 and name[0] == "{" and name[2] == "}" else name


def is_sent(name: str, stage: int, lists: Sequence[str | None]) -> bool:
    """Whether the MTA has sent a macro by a stage.

    Args:
        name: the macro, as ``macro_name`` gives it.
        stage: one of the M_* constants.
        lists: for each stage the macros that the filter asked for, or None.

    Returns:
        Whether it has: where the filter asked for no list at this stage, all macros count as sent.
    """
    if lists[stage] is None:
        return True
    for earlier in STAGE_ORDER[: STAGE_ORDER.index(stage) + 1]:
        macros = lists[earlier]
        if macros is None:
            sent = USUAL_STAGES.get(name) == earlier
        else:
            sent = name in map(macro_name, macros.split())
        if sent:
            return True
    return False
