"""Secrets in addresses: found where an address is given, and hidden where one is shown."""

import re
from typing import NamedTuple

HARMLESS = re.compile(
    "application_name|channel_binding|charset|client_encoding|connect_timeout|gssencmode|host|hostaddr|keepalives"
    "|keepalives_(count|idle|interval)|port|sslcert|sslkey|sslmode|sslrootcert|target_session_attrs|timeout|user"
)
"""Names of parameters that are no secrets; any other may be one."""
_PATHS = ("file", "sqlite")
"""Schemes of files: all that follows is a path."""
_REMEDIES = {
    "http": "put them into MLFLOW_TRACKING_USERNAME and _PASSWORD, or a token into MLFLOW_TRACKING_TOKEN",
    "postgresql": "put it into PGPASSWORD or ~/.pgpass",
    "s3": "credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`]+")


class _Address(NamedTuple):
    scheme: str
    user: str
    """Text before `@`: a user, a password, or both."""
    place: str
    """Host and path."""
    parameters: list[str]
    """Texts `name=value` behind `?`, `&` or `#`, with that character first."""


def _parse(address: str) -> _Address:
    scheme, _, rest = address.partition("://")
    kind = scheme.lower().partition("+")[0]
    if kind in _PATHS:
        return _Address(scheme, "", rest, [])
    host, _, path = rest.partition("/")
    end = host.rfind("@")
    # A password that is not quoted may hold a slash: what looks like a port is no number then.
    if end < 0 and ":" in host and (kind == "postgresql" or not host.rpartition(":")[2].isdecimal()):
        end = len(rest) - len(path) + path.rfind("@") if "@" in path else -1
    place, *parameters = re.split(r"(?=[?&#])", rest[end + 1 :])
    return _Address(scheme, rest[: max(end, 0)], place, parameters)


def _is_secret(parameter: str) -> bool:
    return len(parameter) > 1 and HARMLESS.fullmatch(parameter[1:].partition("=")[0].lower()) is None


def problem(address: str) -> str | None:
    """Say which secret an address holds, and where it belongs; None if it holds none, or is no address."""
    if not _ADDRESS.match(address):
        return None
    parsed = _parse(address)
    kind = parsed.scheme.lower().partition("+")[0].removesuffix("s")
    kind = {"postgre": "postgresql"}.get(kind, kind)
    remedy = _REMEDIES.get(kind, "leave it out")
    if kind == "http" and parsed.user:
        return f"must not hold a user or a password, but does; {remedy}"
    if kind != "s3" and ":" in parsed.user:  # a bucket with a user is no bucket, which is told elsewhere
        return f"must not hold a password, but does; {remedy}"
    secrets = [one[1:].partition("=") for one in parsed.parameters if _is_secret(one)]
    if not secrets:
        return None
    names = ", ".join(name if equals else "text" for name, equals, _ in secrets)
    return f"must not hold parameters that may be secret, got {names}; {remedy}"


def misspelt(place: str) -> str | None:
    """Say what is wrong with an address of a folder or file; None for `s3://` and for a path."""
    found = re.match("([A-Za-z][A-Za-z0-9+.-]+):(/+)", place)
    if not found or place.startswith("s3://"):
        return None
    scheme, slashes = found.groups()
    if scheme.lower() in ("s3", "s3a", "s3n"):
        return f"an address in S3 must begin with s3://, got {found[0]}; write s3://{hidden(place)[found.end() :]}"
    if len(slashes) == 1:
        return None  # a folder may have a colon in its name
    return f"must be a path or s3://bucket/prefix, got one that begins with {found[0]}; change it"


def hidden(text: str) -> str:
    """Remove users, passwords and the values of parameters that may be secret from the addresses in a text."""
    return _ADDRESS.sub(lambda found: _without_secrets(found[0]), text)


def _without_secrets(address: str) -> str:
    scheme, _, place, parameters = _parse(address)
    shown = [
        one if not _is_secret(one) else f"{one.partition('=')[0]}=..." if "=" in one else one[0] + "..."
        for one in parameters
    ]
    return f"{scheme}://{place}{''.join(shown)}"
