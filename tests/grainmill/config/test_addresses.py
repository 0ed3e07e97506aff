import pytest

from grainmill.config.addresses import hidden, misspelt, problem


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no answer at http://me:p@ss@host:5000/x; start it", "no answer at http://host:5000/x; start it"),
        ("postgresql://mill:pass/word@host/db", "postgresql://host/db"),
        (
            "postgresql://h/x?user=me&password=s3cret&sslmode=require",
            "postgresql://h/x?user=me&password=...&sslmode=require",
        ),
        ("postgresql+psycopg2://h/x?sslpassword=s", "postgresql+psycopg2://h/x?sslpassword=..."),
        ("https://h/x?X-Amz-Signature=abc&X-Amz-Date=1 ends", "https://h/x?X-Amz-Signature=...&X-Amz-Date=... ends"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=..."),
        ("https://h/x?abcdef", "https://h/x?..."),
        ("http://me:a?b@host/x", "http://host/x"),
        ("http://host:5000/a@b/c", "http://host:5000/a@b/c"),
        ("sqlite:////home/me@work/a?b=c/x.db", "sqlite:////home/me@work/a?b=c/x.db"),
        ("file:///home/me@work/x and /home/a://b@c", "file:///home/me@work/x and /home/a://c"),
        ("https://host/a and s3://key@bucket", "https://host/a and s3://bucket"),
        ("models:/demo@champion by a@b", "models:/demo@champion by a@b"),
        ('{"a": "s3://bucket/x","b": "me@host"}', '{"a": "s3://bucket/x","b": "me@host"}'),
    ],
)
def test_users_and_passwords_in_addresses_are_hidden(text, shown):
    assert hidden(text) == shown


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("postgresql://h/x?user=me&password=s3cret", "got password; put it into PGPASSWORD"),
        ("postgresql://me:s3cret@h/x", "must not hold a password"),
        ("postgresql://me:s3/cret@h/x", "must not hold a password"),
        ("postgres://h/x?sslpassword=s3cret&token=s3cret", "got sslpassword, token; put it into PGPASSWORD"),
        ("https://h?token=s3cret", "got token; put them into MLFLOW_TRACKING_USERNAME"),
        ("https://h/#s3cret", "got text; put"),
        ("http://s3cret@h", "must not hold a user or a password"),
        ("s3://b/x.jpg?X-Amz-Signature=s3cret", "got X-Amz-Signature; credentials belong in AWS_ACCESS_KEY_ID"),
        ("redis://:s3cret@h", "must not hold a password, but does; leave it out"),
    ],
)
def test_an_address_with_a_secret_is_told_without_it_and_where_it_belongs(address, says):
    message = problem(address)
    assert says in message
    assert "s3cret" not in message


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me@h:5432/x?sslmode=require&connect_timeout=3",
        "postgresql://h1,h2/x?target_session_attrs=read-write",
        "sqlite:////home/me@work/x.db?timeout=3",
        "http://host:5000/a@b",
        "s3://bucket/prefix/x.jpg",
        "models:/demo@champion",
        "/data/a?b=c@d",
        "images #2",
    ],
)
def test_an_address_without_a_secret_and_a_path_are_right(address):
    assert problem(address) is None


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("s3:/bucket/x", "must begin with s3://, got s3:/; write s3://bucket/x"),
        ("S3://bucket/x", "got S3://; write s3://bucket/x"),
        ("s3a://bucket", "got s3a://; write s3://bucket"),
        ("gs://bucket/x", "must be a path or s3://bucket/prefix, got one that begins with gs://"),
        ("file:///data", "got one that begins with file:///"),
    ],
)
def test_an_address_of_another_kind_is_told_with_the_right_spelling(place, says):
    assert says in misspelt(place)


@pytest.mark.parametrize("place", ["s3://bucket/x", "/data", "data/a:b", "c:/data", "no:te", "a b://x", "models:/m@c"])
def test_a_path_and_s3_are_spelt_right(place):
    assert misspelt(place) is None
