import pytest

from lightning_modules.prompt_lists import distinct_prompts, read_prompts


def test_lines_are_prompts_and_comments_are_not(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# things\nteapot\r\n\n  old camera  # on the shelf\nC# book\n#stool\nthé\n".encode())
    assert read_prompts(path) == ["teapot", "old camera", "C# book", "thé"]


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt is no file.*one prompt per line"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt is no UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")


def test_an_empty_prompt_is_refused_with_its_place():
    with pytest.raises(ValueError, match=r"queries\[1\] of 3 prompts is empty"):
        distinct_prompts(["mug", " ", "pot"], "queries")


def test_a_prompt_given_twice_is_asked_once_and_told():
    with pytest.warns(UserWarning, match="queries has 'mug' more than once"):
        assert distinct_prompts(["mug", "pot", "mug "], "queries") == ["mug", "pot"]
