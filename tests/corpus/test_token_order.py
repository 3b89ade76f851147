"""Tests of the order of `TokenDataset`: shuffling, grouping by length, resuming, and Accelerate's own splitting."""

import json
import math
import os
import shutil
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.corpus.formats import BUILT_IN
from nemo_lfr.errors import NemoLfrError
from tests.corpora import write_tokens
from tests.tiers import slow_after, slow_except

pytest.importorskip("lhotse", reason="pip install '.[corpus]'")
pytest.importorskip("pyarrow", reason="pip install '.[corpus]'")

COUNTS = [5, 0, 9, 1, 7, 2]
TOTAL = sum(COUNTS)
ORDERS = {
    "in order": {},
    "shuffled": {"shuffle": True, "buffer_size": 4},
    "shuffled in a large buffer": {"shuffle": True, "buffer_size": 100},
    "grouped": {"buffer_size": 9, "bucket_size": 4},
    "shuffled and grouped": {"shuffle": True, "buffer_size": 9, "bucket_size": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write the same clips in every format. Tests do not change them."""
    made = {}
    for kind in BUILT_IN:
        made[kind] = tmp_path_factory.mktemp(kind)
        write_tokens(made[kind], kind, COUNTS)
    return made


def ids_of(utterances) -> list[str]:
    return [utterance.id for utterance in utterances]


# Resuming.


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(BUILT_IN, "lfr"))
@pytest.mark.parametrize("order", slow_after(2, ORDERS.values()), ids=list(ORDERS))
def test_a_resumed_dataset_yields_what_an_undisturbed_one_yields(order, kind, folders):
    for place in ({}, {"rank": 1, "world_size": 5}):
        dataset = TokenDataset(folders[kind], **order, **place)
        dataset.set_epoch(3)
        expected = ids_of(dataset)
        every = range(len(expected) + 1)
        for number in sorted({*every[:3], *every[4::5], *every[-2:]}):
            dataset.set_epoch(3)
            assert ids_of(islice(iter(dataset), number)) == expected[:number]
            state = json.loads(json.dumps(dataset.state_dict()))
            other = TokenDataset(folders[kind], **order, **place)
            other.load_state_dict(state)
            assert other.state_dict() == state
            assert ids_of(other) == expected[number:]


def test_epochs_after_a_resumed_one_are_those_of_an_undisturbed_dataset(folders):
    dataset = TokenDataset(folders["lfr"], shuffle=True)
    first, second, third = (ids_of(dataset) for _ in range(3))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    stopped = TokenDataset(folders["lfr"], shuffle=True)
    ids_of(stopped)
    ids_of(islice(iter(stopped), 7))
    resumed = TokenDataset(folders["lfr"], shuffle=True)
    resumed.load_state_dict(stopped.state_dict())
    assert [ids_of(resumed), ids_of(resumed)] == [second[7:], third]
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(1)  # the loop of a resumed training sets the same epoch
    assert ids_of(resumed) == second[7:]
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(2)
    assert ids_of(resumed) == third


@pytest.mark.parametrize("order", ["in order", "shuffled", "shuffled and grouped"])
@pytest.mark.parametrize("workers", slow_except([0, 2], 0))
@pytest.mark.parametrize("stop", [0, 3, None])
def test_a_stateful_loader_resumes_to_the_sample(stop, workers, order, folders):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="pip install torchdata")

    def loader():
        dataset = TokenDataset(folders["parquet"], **ORDERS[order])
        return torchdata.StatefulDataLoader(dataset, batch_size=2, num_workers=workers)

    undisturbed = loader()
    epochs = []
    for epoch in (4, 5):
        undisturbed.dataset.set_epoch(epoch)
        epochs.append([batch["id"] for batch in undisturbed])
    stopped, resumed = loader(), loader()
    stopped.dataset.set_epoch(4)
    assert [batch["id"] for batch in islice(stopped, stop)] == epochs[0][:stop]
    resumed.load_state_dict(stopped.state_dict())
    if stop is not None:
        resumed.dataset.set_epoch(4)
        assert [batch["id"] for batch in resumed] == epochs[0][stop:]
    resumed.dataset.set_epoch(5)
    assert [batch["id"] for batch in resumed] == epochs[1]


def test_worker_state_can_be_loaded_by_hand(folders, monkeypatch):
    for number in range(3):
        worker = SimpleNamespace(num_workers=3, id=number)
        monkeypatch.setattr("nemo_lfr.corpus.dataset.get_worker_info", lambda worker=worker: worker)
        dataset = TokenDataset(folders["lfr"], **ORDERS["shuffled"])
        expected = ids_of(dataset)
        ids_of(islice(iter(dataset), 3))
        other = TokenDataset(folders["lfr"], **ORDERS["shuffled"])
        other.load_state_dict(dataset.state_dict())
        assert ids_of(other) == expected[3:]


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_state_of_another_corpus_with_equal_shards_is_refused(kind, folders, tmp_path):
    state = TokenDataset(folders[kind]).state_dict()
    shutil.copytree(folders[kind], tmp_path / "same")
    TokenDataset(tmp_path / "same").load_state_dict(state)
    (tmp_path / "other").mkdir()
    write_tokens(tmp_path / "other", kind, COUNTS, seed=1)
    with pytest.raises(NemoLfrError, match="the state was saved for other tokens than those in "):
        TokenDataset(tmp_path / "other").load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"seed": 1}, {}, "saved with seed=0, but this dataset has seed=1"),
        ({"shuffle": True}, {}, "saved with shuffle=False"),
        ({"buffer_size": 3}, {}, "saved with buffer_size=1000"),
        ({"bucket_size": 3}, {}, "saved with bucket_size=None"),
        ({"drop_last": True}, {}, "saved with drop_last=False"),
        ({"rank": 0, "world_size": 2}, {}, "saved with world_size=1"),
        ({}, {"tokens": "other"}, "saved for other tokens than those in"),
        ({}, {"position": -1}, "position is -1; expected an integer"),
        ({}, {"epoch": True}, "epoch is True; expected an integer"),
        ({}, {"workers": "2"}, "workers is '2'; expected an integer"),
        ({}, {"position": None}, "position is None"),
        ({}, {"position": 10**9}, "there are only"),
        ({}, {"workers": 2}, "saved with 2 data loader workers, but there are 1"),
    ],
    ids=str,
)
def test_a_state_of_another_order_is_refused(options, changes, message, folders):
    state = TokenDataset(folders["lfr"]).state_dict() | changes
    dataset = TokenDataset(folders["lfr"], **options)
    with pytest.raises(NemoLfrError, match=message):
        dataset.load_state_dict(state)
        iter(dataset)


@pytest.mark.parametrize("state", [None, [], "state", 5, {}, {"seed": 0}])
def test_a_state_that_state_dict_did_not_return_is_refused(state, folders):
    with pytest.raises(NemoLfrError, match="pass the return value of state_dict"):
        TokenDataset(folders["lfr"]).load_state_dict(state)


@pytest.mark.parametrize("epoch", [-1, 2**63, "x", None, 1.5, True])
def test_an_epoch_without_a_number_is_refused(epoch, folders):
    with pytest.raises(NemoLfrError, match=r"epoch is .*; pass an integer"):
        TokenDataset(folders["lfr"]).set_epoch(epoch)


# Shuffling and grouping.


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_shuffle_buffer_is_bounded(size, tmp_path):
    write_tokens(tmp_path, "lfr", [20])  # one shard, so that only the buffer changes the order
    in_order = ids_of(TokenDataset(tmp_path))
    shuffled = ids_of(TokenDataset(tmp_path, shuffle=True, buffer_size=size))
    assert sorted(shuffled) == sorted(in_order) and (shuffled == in_order) == (size == 1)
    assert all(in_order.index(name) < place + size for place, name in enumerate(shuffled))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, list[str]]:
    """Return two shards of 40 and 24 clips, and the ids of the clips."""
    folder = tmp_path_factory.mktemp("many")
    return folder, sorted(write_tokens(folder, "lfr", [40, 24]))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bucket_size", [1, 3, 4])
@pytest.mark.parametrize("workers", slow_except([0, 2], 0))
def test_groups_hold_utterances_of_similar_length(workers, bucket_size, shuffle, many):
    folder, everything = many

    def waste(size):
        dataset = TokenDataset(folder, shuffle=shuffle, buffer_size=24, bucket_size=size)
        batches = list(DataLoader(dataset, batch_size=bucket_size, num_workers=workers))
        assert sorted(name for batch in batches for name in batch["id"]) == everything
        return sum(int((~batch["mask"]).sum()) for batch in batches)

    assert waste(bucket_size) <= waste(None) * (0.6 if bucket_size > 1 else 1)


def test_groups_of_all_ranks_have_similar_lengths_in_each_step(tmp_path):
    write_tokens(tmp_path, "lfr", [64])
    lengths = []
    for rank in range(2):
        place = {"rank": rank, "world_size": 2}
        dataset = TokenDataset(tmp_path, shuffle=True, buffer_size=32, bucket_size=4, **place)
        lengths.append(torch.tensor([utterance.tokens.shape[1] for utterance in dataset]).view(8, 4).double().mean(1))
    assert (lengths[0] - lengths[1]).abs().max() <= 2.5  # of 1 to 8 frames
    assert lengths[0].diff().sign().unique().numel() > 1  # the groups are shuffled


@pytest.mark.parametrize("size", [0, -1, 1001, 2.5, "3", True])
def test_an_impossible_group_size_is_refused(size, folders):
    with pytest.raises(NemoLfrError, match="bucket_size is"):
        TokenDataset(folders["lfr"], bucket_size=size)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("buffer_size", {"buffer_size": 2.5}),
        ("buffer_size", {"buffer_size": "3"}),
        ("buffer_size", {"buffer_size": 0}),
        ("rank", {"rank": "0", "world_size": 1}),
        ("rank", {"rank": 1, "world_size": 1}),
        ("world_size", {"rank": 0, "world_size": 1.0}),
    ],
)
def test_arguments_that_are_not_whole_numbers_are_refused(name, arguments, folders):
    with pytest.raises(NemoLfrError, match=rf"^{name} is .*; pass an integer"):
        TokenDataset(folders["lfr"], **arguments)


# Accelerate and the Hugging Face Trainer.


class IterableDatasetShard(IterableDataset):
    """Replacement for the wrapper of Accelerate, which reads all utterances and yields every n-th batch."""

    def __init__(self, dataset, batch_size: int, num_processes: int, process_index: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.num_processes, self.process_index = num_processes, process_index

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / (self.batch_size * self.num_processes)) * self.batch_size

    def __iter__(self):
        for number, utterance in enumerate(self.dataset):
            if number // self.batch_size % self.num_processes == self.process_index:
                yield utterance


def test_a_wrapper_that_splits_gets_everything(folders, monkeypatch):
    monkeypatch.setattr("nemo_lfr.corpus.dataset._is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        dataset = TokenDataset(folders["lfr"], shuffle=True, buffer_size=5)
        assert len(dataset) == TOTAL // 2
        shard = IterableDatasetShard(dataset, 3, num_processes=2, process_index=rank)
        assert len(shard) == TOTAL // 2
        seen += ids_of(shard)
    assert len(seen) == len(set(seen)) == TOTAL
    dataset = TokenDataset(folders["lfr"], rank=1, world_size=2)
    with pytest.raises(NemoLfrError, match="pass rank=0 and world_size=1"):
        ids_of(IterableDatasetShard(dataset, 3, num_processes=2, process_index=1))


def test_an_inferred_rank_is_refused_when_an_accelerator_may_dispatch(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate.state", SimpleNamespace(is_initialized=lambda: True))
    assert len(ids_of(TokenDataset(folders["lfr"]))) == TOTAL  # one process
    monkeypatch.setattr("nemo_lfr.corpus.dataset._is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(NemoLfrError, match="Accelerate is in use with 2 processes"):
        iter(TokenDataset(folders["lfr"]))
    assert len(ids_of(TokenDataset(folders["lfr"], rank=0, world_size=1))) == TOTAL
    assert len(ids_of(TokenDataset(folders["lfr"], rank=1, world_size=2))) == TOTAL // 2


def _accelerated(rank: int, folder: Path, store: Path, results: Path) -> None:
    """Read with Accelerate in each documented way, and report the ids that this rank reads."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    report = {"processes": accelerator.num_processes}
    for name, options in {"inferred": {}, "explicit": {"rank": 0, "world_size": 1}}.items():
        for workers in (0, 1):
            dataset = TokenDataset(folder, shuffle=True, buffer_size=5, **options)
            loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=TokenDataset.collate)
            loader = accelerator.prepare(loader)
            report[f"{name} {workers}"] = [[name for batch in loader for name in batch["id"]] for _ in range(2)]
            report[f"length {name} {workers}"] = len(loader)
    for name, options in {"twice": {"rank": rank, "world_size": 2}, "dispatched": {}}.items():
        accelerator.dataloader_config.dispatch_batches = name == "dispatched"
        loader = accelerator.prepare(DataLoader(TokenDataset(folder, **options), batch_size=3))
        if name == "twice" or rank == 0:  # only rank 0 reads when batches are dispatched
            with pytest.raises(NemoLfrError, match="rank"):
                next(iter(loader))
    (results / f"{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_accelerate_splits_the_utterances_once(folders, tmp_path):
    pytest.importorskip("accelerate", reason="pip install accelerate")
    torch.multiprocessing.spawn(_accelerated, (folders["lfr"], tmp_path / "store", tmp_path), nprocs=2, join=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["processes"] == 2
    for name in first:
        if name.startswith(("inferred", "explicit")):
            for epoch in range(2):
                assert sorted(first[name][epoch] + second[name][epoch]) == sorted(ids_of(TokenDataset(folders["lfr"])))
            assert first[name][0] != first[name][1]
        elif name.startswith("length"):
            assert first[name] == second[name] == 4
