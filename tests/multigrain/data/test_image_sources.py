"""Which images a folder, a manifest or a bucket has, and their contents."""

import hashlib
import os
import pickle

import pytest

from grainmill.storage.mirror import S3Files
from multigrain.data import image_sources
from multigrain.data.listing import OTHER
from multigrain.errors import DataError
from multigrain.hooks import LocalFiles


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_a_folder_has_the_images_below_it_in_a_fixed_order(tmp_path):
    write(tmp_path, "b/2.JPG", "b/1.png", "a.webp", "notes.txt", "c/deep/er.tiff", "index.json")
    images = pickle.loads(pickle.dumps(image_sources.images(str(tmp_path), LocalFiles())))
    assert images.listing().names == ["a.webp", "b/1.png", "b/2.JPG", "c/deep/er.tiff"]
    assert images.read("b/2.JPG") == b"b/2.JPG"
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        images.read("b/3.png")


def test_no_name_leads_out_of_a_folder(tmp_path):
    write(tmp_path, "in/a.jpg", "out.jpg")
    images = image_sources.images(str(tmp_path / "in"), LocalFiles())
    for name in ("../out.jpg", "x/../../out.jpg", f"{tmp_path}/out.jpg"):
        with pytest.raises(ValueError, match="is not below the folder"):
            images.read(name)


def test_a_manifest_has_the_images_of_its_column_each_once(tmp_path):
    write(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / "list.csv").write_text(f"role,image\ndatabase,sub/b.jpg\nquery,{tmp_path}/a.jpg\nquery,sub/b.jpg\n\n")
    images = pickle.loads(pickle.dumps(image_sources.images(str(tmp_path / "list.csv"), LocalFiles())))
    assert images.listing().names == ["sub/b.jpg", f"{tmp_path}/a.jpg"]
    assert [images.read(name) for name in images.listing().names] == [b"sub/b.jpg", b"a.jpg"]


def test_spellings_of_one_file_are_one_image(tmp_path):
    write(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / "link.jpg").symlink_to("sub/b.jpg")
    (tmp_path / "list.csv").write_text(
        f"image\nsub/b.jpg\n./sub/b.jpg\na.jpg\n{tmp_path}/a.jpg\nlink.jpg\nsub/../a.jpg\ngone.jpg\n./gone.jpg\n"
    )
    images = image_sources.images(str(tmp_path / "list.csv"), LocalFiles())
    assert images.listing().names == ["sub/b.jpg", "a.jpg", "gone.jpg"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("picture\na.jpg\n", ["line 1: unknown column 'picture'", "the column 'image' is required"]),
        ("image,class\na.jpg\n,x\n", ["line 2: a row must have as many cells", "line 3: the cell of 'image'"]),
        ("", ["must begin with its columns"]),
    ],
)
def test_all_that_is_wrong_with_a_manifest_is_told(tmp_path, text, told):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        image_sources.images(str(tmp_path / "list.csv"), LocalFiles()).listing()
    assert len(caught.value.problems) == len(told)
    assert all(words in problem for words, problem in zip(told, caught.value.problems, strict=True))


def test_what_is_no_source_is_told(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; name one"):
        image_sources.images(str(tmp_path / "nowhere"), LocalFiles())
    with pytest.raises(DataError, match="the manifest must exist"):
        image_sources.images(str(tmp_path / "nowhere.csv"), LocalFiles()).listing()
    with pytest.raises(DataError, match="must be s3://bucket/prefix"):
        image_sources.images("s3://user:password@host/x", S3Files())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_is_closed_is_told_with_its_reason(tmp_path):
    write(tmp_path, "a/b.jpg")
    (tmp_path / "a").chmod(0)
    listing = image_sources.images(str(tmp_path), LocalFiles()).listing()
    with pytest.raises(DataError, match=r"Permission denied.*change its permissions"):
        image_sources.images(str(tmp_path / "a"), LocalFiles()).listing()
    (tmp_path / "a").chmod(0o700)
    assert (listing.names, listing.left_out) == ([], {"a": "cannot be listed (Permission denied)"})


def test_a_bucket_has_the_images_below_a_prefix(bucket):
    bucket.put(**{"set/b/2.jpg": b"two", "set/1.png": b"one", "set/notes.txt": b"x", "other/3.png": b"three"})
    bucket.put(**{"set/b/": b"", "set/.git/4.png": b"x", "set/b/__MACOSX/._2.jpg": b"x", "set/b/5.jp2": b"x"})
    images = pickle.loads(pickle.dumps(image_sources.images(f"s3://{bucket.name}/set", S3Files())))
    assert images.listing() == (
        ["1.png", "b/2.jpg"],
        {"b/5.jp2": "is a .jp2 file, which is not read; save it as JPEG or PNG", "notes.txt": OTHER},
        2,
    )
    assert [images.read(name) for name in images.listing().names] == [b"one", b"two"]
    one, two = (f'"{hashlib.md5(content).hexdigest()}"' for content in (b"one", b"two"))
    assert images.versions(["1.png", "b/2.jpg", "gone.png"]) == {"1.png": (3, one), "b/2.jpg": (3, two)}
    with pytest.raises(ValueError, match="must stay as it was listed"):
        images.read("gone.png")


def test_a_large_object_is_refused_before_it_is_read(bucket, monkeypatch):
    bucket.put(**{"set/1.png": b"four", "set/2.png": b"three"})
    monkeypatch.setattr(image_sources, "MOST_BYTES", 4)
    monkeypatch.setattr("botocore.response.StreamingBody.read", lambda *_: b"read")
    images = image_sources.images(f"s3://{bucket.name}/set", S3Files())
    assert images.read("1.png") == b"read"
    with pytest.raises(ValueError, match="has more than 4 bytes, the most that are read"):
        images.read("2.png")


def test_a_version_of_a_file_is_its_size_and_time(tmp_path):
    write(tmp_path, "a.png", "b.png")
    os.utime(tmp_path / "a.png", ns=(7, 123_456_789))
    images = image_sources.images(str(tmp_path), LocalFiles())
    assert images.versions(["a.png", "gone.png", "\0.png"]) == {"a.png": (5, "123456789")}


def test_a_bucket_without_permission_is_told(bucket, proxy):
    bucket.put(**{"set/1.png": b"one"})
    images = image_sources.images(f"s3://{bucket.name}/set/", S3Files())
    proxy.faults[f"/{bucket.name}"] = [(403, "AccessDenied")] * 9
    with pytest.raises(DataError, match="access is denied; allow s3:ListBucket and s3:GetObject"):
        images.listing()
    proxy.faults = {f"/{bucket.name}/set/1.png": [(403, "AccessDenied")] * 9}
    with pytest.raises(ValueError, match=r"set/1.png must be open to these credentials"):
        images.read("1.png")
