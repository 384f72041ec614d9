"""Who is told of a tenant's alarms, from the settings of its registrar or verifier.

Invariants:
    1. Registrar and verifier of one folder sign Keylime's form with one key, whichever of them made it.

Owner: the two services.

Spec: docs/protocol.md (notifications).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.config import TenantRegistrarSettings, TenantVerifierSettings
from harness.errors import ConfigError
from harness.tenant.notices import Notice, load_or_make
from harness.tenant.notifier import Receiver
from harness.web_hook import Webhook

Notifying = TenantRegistrarSettings | TenantVerifierSettings


def receivers_of(settings: Notifying, service: str) -> list[Receiver]:
    """Who is told of alarms. The revocation key is made where a receiver needs it and there is none yet.

    Args:
        settings: of the service.
        service: its name, which our own form tells.

    Raises:
        ConfigError: an authority or the key cannot be used, or it is not said where the key is.
    """

    def native(notice: Notice) -> object:
        return {"service": service, **notice.native()}

    forms: dict[str, Callable[[Notice], object]] = {"native": native}
    if any(notify.format == "keylime" for notify in settings.notify):
        forms["keylime"] = load_or_make(revocation_key_path(settings)).signed
    return [Receiver(Webhook(each.url, each.authority), forms[each.format]) for each in settings.notify]


def revocation_key_path(settings: Notifying) -> Path:
    """Where the key for Keylime's notifications is: as set, else beside the SQLite database.

    Raises:
        ConfigError: neither says where.
    """
    if settings.revocation_key is not None:
        return settings.revocation_key
    scheme, _, file = settings.database.partition(":///")
    if not scheme.startswith("sqlite") or not file or file.startswith((":memory:", "file:")):
        raise ConfigError("revocation_key: must say where the key for keylime notifications is kept")
    return Path(file).with_name("revocation.key")
