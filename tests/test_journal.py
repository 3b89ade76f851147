"""What a long job has done survives whatever ends it."""

from nemo_lfr.journal import Journal


def test_entries_come_back_and_a_line_that_was_cut_off_is_passed_by(tmp_path):
    path = tmp_path / "done.jsonl"
    with Journal(path) as journal:
        journal.add(["a", 1])
        journal.add(["b", {"text": "ü\n"}])
    path.write_bytes(path.read_bytes() + b'["c", "half\xc3')
    with Journal(path) as journal:
        assert list(journal) == [["a", 1], ["b", {"text": "ü\n"}]]
        journal.add(["c", 3])
    with Journal(path) as journal:
        assert [key for key, _ in journal] == ["a", "b", "c"]
