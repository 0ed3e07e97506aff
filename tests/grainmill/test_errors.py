"""What messages leave out."""

import pytest

from grainmill.errors import hidden


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no answer at http://me:p@ss@host:5000/x; start it", "no answer at http://host:5000/x; start it"),
        ("postgresql://mill:pass/word@host/db", "postgresql://host/db"),
        ("https://host/a and s3://key@bucket", "https://host/a and s3://bucket"),
        ("models:/demo@champion by a@b", "models:/demo@champion by a@b"),
        ('{"a": "s3://bucket/x","b": "me@host"}', '{"a": "s3://bucket/x","b": "me@host"}'),
    ],
)
def test_users_and_passwords_in_addresses_are_hidden(text, shown):
    assert hidden(text) == shown
