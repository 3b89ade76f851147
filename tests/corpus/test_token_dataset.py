"""Tests of `TokenDataset`: equal shares in real process groups, workers, batches and damaged files."""

import copy
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nemo_lfr.corpus.dataset import TokenDataset, collate
from nemo_lfr.corpus.formats import BUILT_IN
from nemo_lfr.corpus.token_folder import TokenFolder
from nemo_lfr.errors import NemoLfrError, TokenFileError
from tests.corpora import write_tokens
from tests.tiers import slow_except

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")

UNEVEN = [5, 5, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write twelve clips in shards of five, in every format. Tests do not change them."""
    made = {}
    for kind in BUILT_IN:
        made[kind] = tmp_path_factory.mktemp(kind)
        write_tokens(made[kind], kind, UNEVEN)
    return made


def ids_of(dataset: TokenDataset, **options) -> list[str]:
    return [utterance.id for utterance in DataLoader(dataset, batch_size=None, **options)]


@pytest.mark.parametrize("kind", BUILT_IN)
@pytest.mark.parametrize("has_records", [True, False])
def test_every_format_gives_back_what_was_written(kind, has_records, tmp_path):
    context = kind != "lfr"
    made = write_tokens(tmp_path, kind, [3, 0, 70], context=context)
    if not has_records:  # like a folder that an older version wrote and that was copied without `.tokenize`
        shutil.rmtree(tmp_path / ".tokenize")
        summary = json.loads((tmp_path / "tokens.json").read_text())
        del summary["shard_clips"]
        (tmp_path / "tokens.json").write_text(json.dumps(summary))
        with pytest.raises(NemoLfrError, match="hashes of 3 of 3 shards are missing"):
            TokenDataset(tmp_path, verify=True)
    dataset = TokenDataset(tmp_path, verify=has_records)
    assert (len(dataset), dataset.num_codebooks, dataset.codebook_size) == (73, 8, 2016)
    utterances = list(dataset)
    assert [utterance.id for utterance in utterances] == list(made)
    for number, utterance in enumerate(utterances):
        tokens = made[utterance.id]
        assert np.array_equal(utterance.tokens.numpy(), tokens) and utterance.tokens.dtype == torch.int64
        assert utterance.num_samples == 1024 * tokens.shape[1] - 7 and utterance.labels["text"] == "a"
        expected = tokens[:, :2] if context and number % 2 == 0 else None
        assert (utterance.context is None) == (expected is None)
        assert expected is None or np.array_equal(utterance.context.numpy(), expected)


class CutTokens(torch.utils.data.Dataset):
    """Dataset in the style of Lhotse, which returns the ids and tokens for a batch of cuts."""

    def __getitem__(self, cuts) -> list[tuple[str, list]]:
        return [(cut.id, cut.target_codes.load().tolist()) for cut in cuts]


@pytest.mark.parametrize("world_size", [1, 2])
def test_lhotses_own_loader_reads_the_same_utterances(world_size, folders):
    from lhotse import CutSet
    from lhotse.dataset import SimpleCutSampler

    ours, theirs = {}, {}
    for rank in range(world_size):
        for utterance in TokenDataset(folders["shar"], rank=rank, world_size=world_size):
            ours[utterance.id] = utterance.tokens.tolist()
        cuts = CutSet.from_shar(in_dir=folders["shar"] / "shar")
        sampler = SimpleCutSampler(cuts, max_cuts=3, rank=rank, world_size=world_size)
        for batch in DataLoader(CutTokens(), batch_size=None, sampler=sampler):
            theirs |= dict(batch)
    assert len(ours) == sum(UNEVEN) and ours == theirs


@pytest.mark.parametrize("counts", [[2, 3], [2, 2]], ids=str)
@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_folder_that_was_replaced_is_not_read_further(kind, counts, tmp_path):
    out = tmp_path / "out"
    write_tokens(out, kind, [2, 2])
    dataset = TokenDataset(out)
    utterances = iter(dataset)
    next(utterances)
    text = (out / "tokens.json").read_text()
    (out / "tokens.json").write_text(json.dumps(json.loads(text) | {"torch": "9.9.9"}))  # the same run, resumed
    assert len(list(dataset)) == 4
    shutil.rmtree(out)
    write_tokens(out, kind, counts, seed=1)
    with pytest.raises(TokenFileError, match="the folder was replaced after it was opened; open it again"):
        list(dataset)


def test_a_folder_that_was_moved_is_read(tmp_path):
    made = write_tokens(tmp_path / "old", "manifest", [2])
    (tmp_path / "old").rename(tmp_path / "new")
    assert [utterance.id for utterance in TokenDataset(tmp_path / "new")] == list(made)


# Shares of ranks and workers.


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILT_IN)
@pytest.mark.parametrize("shuffle", [False, True])
def test_one_rank_reads_everything_once_with_any_number_of_workers(kind, shuffle, folders):
    expected = sorted(utterance.id for utterance in TokenDataset(folders[kind]))
    for workers in (0, 1, 2):
        dataset = TokenDataset(folders[kind], shuffle=shuffle, buffer_size=3)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            assert sorted(ids_of(dataset, num_workers=workers)) == expected


@pytest.mark.parametrize("counts", [UNEVEN, [1], [], [0, 0, 3], [1] * 7, [13, 1]], ids=str)
@pytest.mark.parametrize("world_size", slow_except([1, 2, 3, 16], 3))
@pytest.mark.parametrize("drop_last", [False, True])
def test_all_ranks_yield_as_many_utterances_as_len_says(counts, world_size, drop_last, tmp_path):
    made = write_tokens(tmp_path, "lfr", counts)
    for shuffle in (False, True):
        seen = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "drop_last": drop_last, "shuffle": shuffle}
            dataset = TokenDataset(tmp_path, buffer_size=4, **options)
            ids = [utterance.id for utterance in dataset]
            share = len(made) // world_size if drop_last else -(-len(made) // world_size)
            assert len(ids) == len(dataset) == share
            seen += ids
        most = max((seen.count(name) for name in seen), default=0)
        if drop_last:
            assert most <= 1
        else:  # as many repeats as with DistributedSampler
            assert set(seen) == set(made) and most <= -(-world_size // max(1, len(made))) + 1


@pytest.mark.slow
def test_epochs_have_different_orders_shared_by_workers(folders):
    dataset = TokenDataset(folders["lfr"], shuffle=True)
    first, second = ([utterance.id for utterance in dataset] for _ in range(2))
    assert sorted(first) == sorted(second) and first != second
    assert first == [utterance.id for utterance in TokenDataset(folders["lfr"], shuffle=True)]
    orders = []
    for persistent in (False, True):
        loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=persistent)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            orders.append([utterance.id for utterance in loader])
    assert orders == [first, second] * 2


def saved(dataset):
    file = io.BytesIO()
    torch.save(dataset, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [lambda dataset: pickle.loads(pickle.dumps(dataset)), copy.deepcopy, saved])
def test_workers_of_a_copied_dataset_see_its_epoch(copied, folders):
    dataset = TokenDataset(folders["lfr"], shuffle=True)
    expected = [[utterance.id for utterance in dataset] for _ in range(2)]
    duplicate = copied(TokenDataset(folders["lfr"], shuffle=True))
    loader = DataLoader(duplicate, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1):
        duplicate.set_epoch(epoch)
        orders.append([utterance.id for utterance in loader])
    assert orders == expected


@pytest.mark.parametrize("copied", [lambda dataset: dataset, copy.deepcopy, saved])
def test_only_workers_need_shared_memory(copied, folders, monkeypatch):
    expected = TokenDataset(folders["lfr"], shuffle=True)
    orders = [ids_of(expected) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "share_memory_", raise_read_only)
        dataset = copied(TokenDataset(folders["lfr"], shuffle=True))
        assert [ids_of(dataset) for _ in range(2)] == orders
        with pytest.raises(NemoLfrError, match="data loader workers need shared memory"):
            ids_of(dataset, num_workers=1)
    dataset.set_epoch(1)
    assert ids_of(dataset, num_workers=1) == orders[1]  # the memory is available again


def raise_read_only(tensor):
    raise RuntimeError("unable to open shared memory object: Read-only file system (30)")


def read_epochs(dataset, barrier, queue):
    orders = []
    for _ in range(2):
        barrier.wait()
        orders.append([utterance.id for utterance in DataLoader(dataset, batch_size=None)])
        barrier.wait()
    queue.put(orders)


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_processes_that_inherit_a_dataset_count_their_own_epochs(method, folders):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no start method {method}")
    context = torch.multiprocessing.get_context(method)
    dataset = TokenDataset(folders["lfr"], shuffle=True)
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=read_epochs, args=(dataset, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = (queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert first == second == [[utterance.id for utterance in dataset] for _ in range(2)]


def set_an_epoch_late(dataset, method, queue):
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=method
    )
    orders = [[utterance.id for utterance in loader]]
    dataset.set_epoch(1)
    queue.put([*orders, [utterance.id for utterance in loader]])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_of_an_inherited_dataset_follow_its_epoch(start, method, folders):
    context = torch.multiprocessing.get_context(start)
    dataset, queue = TokenDataset(folders["lfr"], shuffle=True), context.Queue()
    process = context.Process(target=set_an_epoch_late, args=(dataset, method, queue))
    process.start()
    orders = queue.get(timeout=120)
    process.join()
    assert orders == [[utterance.id for utterance in dataset] for _ in range(2)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "looks",
    [lambda dataset: next(iter(dataset)), lambda dataset: list(dataset), lambda dataset: [iter(dataset)] * 2],
    ids=["at the first", "at all", "at none"],
)
def test_ranks_share_one_order_after_unequal_iteration(looks, world_size, shuffle, folders):
    seen = []
    for rank in range(world_size):
        dataset = TokenDataset(folders["lfr"], shuffle=shuffle, rank=rank, world_size=world_size, buffer_size=2)
        for _ in range(rank):
            looks(dataset)
        seen += [utterance.id for utterance in dataset]
    assert len(seen) == len(set(seen)) == sum(UNEVEN)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"world_size": 2},
        {"rank": 2, "world_size": 2},
        {"rank": -1, "world_size": 2},
        {"rank": 0, "world_size": 0},
        {"buffer_size": 0},
        {"seed": "abc"},
        {"seed": None},
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(options, folders):
    with pytest.raises(NemoLfrError):
        TokenDataset(folders["lfr"], **options)


def test_a_file_in_the_folder_of_tokens_names_the_folder(folders):
    file = folders["lfr"] / "tokens.json"
    with pytest.raises(NemoLfrError, match=f"this is a file in a folder of tokens; pass the folder {file.parent}"):
        TokenDataset(file)


def _train(rank: int, world_size: int, folders: dict[str, Path], store: Path, results: Path) -> None:
    """Run one rank of a training with an all-reduce in every step, which hangs if another rank has fewer steps."""
    torch.set_num_threads(1)
    before = TokenDataset(folders["lfr"])  # created before the process group
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    report = {}
    for kind, folder in folders.items():
        starts = ((0, None), (2, "fork"), *([(1, "spawn")] if world_size == 2 else []))
        for workers, start in starts if kind == "lfr" else starts[:1]:
            dataset = before if (kind, workers) == ("lfr", 0) else TokenDataset(folder, shuffle=workers == 2)
            loader = DataLoader(dataset, batch_size=2, num_workers=workers, multiprocessing_context=start)
            for epoch in (0, 1):
                dataset.set_epoch(epoch)
                ids = []
                for batch in loader:
                    torch.distributed.all_reduce(torch.ones(3))
                    ids += batch["id"]
                report[f"{kind} {workers} {epoch}"] = [ids, len(dataset)]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    (results / f"{rank}.json").write_text(json.dumps(report))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_ranks_of_a_process_group_take_equal_steps(world_size, folders, tmp_path):
    torch.multiprocessing.spawn(
        _train, (world_size, folders, tmp_path / "store", tmp_path), nprocs=world_size, join=True
    )
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert len(reports[0]) == 2 * (3 + (3 if world_size == 2 else 2))
    for name in reports[0]:
        shares = [report[name] for report in reports]
        assert all(len(ids) == length == 12 // world_size for ids, length in shares), name
        assert len({clip_id for ids, _ in shares for clip_id in ids}) == 12, name


def test_an_unpickled_dataset_uses_the_rank_of_its_own_process(folders):
    copy = pickle.loads(pickle.dumps(TokenDataset(folders["lfr"])))
    assert copy._given is None and (copy.rank, copy.world_size) == (0, 1)


# Batches.


@pytest.mark.slow
@pytest.mark.parametrize("collate_fn", [None, collate, TokenDataset.collate])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_padded_and_masked(collate_fn, workers, tmp_path):
    made = write_tokens(tmp_path, "parquet", [4], context=True)
    loader = DataLoader(TokenDataset(tmp_path), batch_size=4, collate_fn=collate_fn, num_workers=min(workers, 1))
    (batch,) = loader
    longest = max(tokens.shape[1] for tokens in made.values())
    assert batch["id"] == list(made) and batch["tokens"].shape == (4, 8, longest)
    assert batch["context"].shape == (4, 8, 2) and batch["context_len"].tolist()[1::2] == [0, 0]
    for row, tokens in enumerate(made.values()):
        length = tokens.shape[1]
        assert batch["tokens_len"][row] == length == batch["mask"][row].sum()
        assert np.array_equal(batch["tokens"][row, :, :length], tokens) and not batch["tokens"][row, :, length:].any()
        assert batch["num_samples"][row] == 1024 * length - 7
    with pytest.raises(NemoLfrError, match="no utterances"):
        collate([])
    with pytest.raises(NemoLfrError, match="utterance 1 is None; pass items of a TokenDataset"):
        collate([next(iter(TokenDataset(tmp_path))), None])
    with pytest.raises(NemoLfrError, match="is one utterance; pass a list"):
        collate(next(iter(TokenDataset(tmp_path))))
    for pad in (None, 1.5, "0"):
        with pytest.raises(NemoLfrError, match=r"pad is .*; pass an integer"):
            collate(TokenDataset(tmp_path), pad)
    assert torch.equal(collate(iter(TokenDataset(tmp_path)))["tokens"], batch["tokens"])


def test_the_working_directory_may_change(folders, monkeypatch):
    monkeypatch.chdir(folders["parquet"].parent)
    dataset = TokenDataset(folders["parquet"].name, seed=np.int64(3), shuffle=True)
    monkeypatch.chdir("/")
    assert len(list(dataset)) == len(dataset)


@pytest.mark.parametrize("name", ["shuffle", "drop_last", "verify"])
def test_a_text_is_not_taken_for_true(tmp_path, name):
    with pytest.raises(NemoLfrError, match=f"{name} is 'no'; pass True or False"):
        TokenDataset(tmp_path, **{name: "no"})


# Damage.


def _cut_tar_at_a_member(path: Path) -> None:
    with tarfile.open(path) as file:
        os.truncate(path, file.getmembers()[2].offset)


def _drop_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def _fewer_rows(path: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "shar tar ends at a member": ("shar", "shar/target_codes.000000.tar", _cut_tar_at_a_member),
    "shar tar is empty": ("shar", "shar/target_codes.000000.tar", lambda path: path.write_bytes(b"")),
    "shar tar without members": (
        "shar",
        "shar/target_codes.000000.tar",
        lambda path: tarfile.open(path, "w").close(),
    ),
    "shar tar is cut": ("shar", "shar/target_codes.000000.tar", lambda path: os.truncate(path, 700)),
    "shar tar is missing": ("shar", "shar/target_codes.000000.tar", lambda path: path.unlink()),
    "cuts are empty": ("shar", "shar/cuts.000000.jsonl.gz", lambda path: path.write_bytes(gzip.compress(b""))),
    "cuts are no bytes": ("shar", "shar/cuts.000000.jsonl.gz", lambda path: path.write_bytes(b"")),
    "cuts are cut": ("shar", "shar/cuts.000000.jsonl.gz", lambda path: os.truncate(path, path.stat().st_size - 8)),
    "parquet is shorter": ("parquet", "data/000000.parquet", _fewer_rows),
    "parquet is cut": ("parquet", "data/000000.parquet", lambda path: os.truncate(path, 300)),
    "parquet is missing": ("parquet", "data/000000.parquet", lambda path: path.unlink()),
    "manifest lacks a line": ("manifest", "manifest.json", _drop_line),
    "lfr manifest lacks a line": ("lfr", "manifest.json", _drop_line),
    "manifest is empty": ("manifest", "manifest.json", lambda path: path.write_bytes(b"")),
    "manifest has a line more": ("manifest", "manifest.json", lambda path: path.write_bytes(path.read_bytes() * 2)),
    "a .pt is cut": ("manifest", "target_codes/s0/clip1.pt", lambda path: os.truncate(path, 500)),
    "an .lfr is cut": ("lfr", "tokens/s0/clip1.lfr", lambda path: os.truncate(path, 50)),
}


@pytest.mark.parametrize("has_records", [True, False])
@pytest.mark.parametrize(("kind", "name", "damage"), DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_or_truncated_tokens_raise(kind, name, damage, has_records, tmp_path):
    write_tokens(tmp_path, kind, [3, 2])
    if not has_records:
        shutil.rmtree(tmp_path / ".tokenize")
    damage(tmp_path / name)
    with pytest.raises(TokenFileError) as error:
        list(TokenDataset(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("stop", [2, None])
def test_the_place_where_a_tar_ends_does_not_depend_on_what_is_read(stop, tmp_path):
    write_tokens(tmp_path, "shar", [3])
    tar = tmp_path / "shar" / "target_codes.000000.tar"
    _cut_tar_at_a_member(tar)  # one utterance remains
    *_, error = TokenFolder(tmp_path).read(0, 0, stop)
    assert str(error).startswith(f"{tar}: file is truncated after 1 utterance; ")


@pytest.mark.parametrize("kind", BUILT_IN)
def test_verification_finds_a_flipped_bit(kind, tmp_path):
    write_tokens(tmp_path, kind, [3, 2])
    mark = json.loads((tmp_path / ".tokenize" / "done" / "000001.json").read_text())
    _flip(tmp_path / next(name for name in mark["files"] if ".tokenize" not in name))
    with pytest.raises(TokenFileError, match="SHA-256"):
        list(TokenDataset(tmp_path, verify=True))
