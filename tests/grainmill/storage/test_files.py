"""Files that are written as a whole, and digests."""

import pytest

from grainmill.storage import files


def test_a_file_is_as_it_was_until_its_draft_is_complete(tmp_path):
    file = tmp_path / "note.txt"
    files.write_text(file, "one")
    with files.atomic(file) as draft:
        draft.write_text("two")
        assert file.read_text() == "one"
    assert file.read_text() == "two"
    with pytest.raises(FileNotFoundError), files.atomic(file):
        pass
    assert file.read_text() == "two"
    files.write_text(file, "a\udce4")
    assert file.read_text() == "a\\udce4"
    assert list(tmp_path.glob("*.draft")) == []


def test_the_digest_of_a_folder_tells_names_and_contents_apart(tmp_path):
    folders = []
    for number, contents in enumerate(
        [{"a": "12", "b": "3"}, {"a": "1", "b": "23"}, {"a": "12", "c": "3"}, {"a/b": "3", "c": "12"}, {"a": "12"}]
    ):
        for name, text in contents.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        folders.append(tmp_path / str(number))
    (tmp_path / "again").mkdir()
    for name, text in (("b", "3"), ("a", "12")):
        (tmp_path / "again" / name).write_text(text)
    digests = [files.folder_digest(folder) for folder in folders]
    assert len(set(digests)) == len(folders)
    assert files.folder_digest(tmp_path / "again") == digests[0]
