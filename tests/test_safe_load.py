"""What a checkpoint file can do to its reader: nothing but hand over tensors and plain values."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch

from digit_ds.errors import UserError
from digit_ds.safe_load import load_torch


class Touch:
    """Creates a folder when unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zip_format", [True, False])
def test_reads_both_file_formats(tmp_path, zip_format):
    weight = torch.randn(3, 4)
    torch.save({"model": {"weight": weight}}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    assert torch.equal(load_torch(tmp_path / "a.pt")["model"]["weight"], weight)


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zip_format):
    torch.save({"x": Touch(tmp_path / "ran")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(UserError, match=r"a\.pt: holds a Python object \(posix.mkdir\) that could run code"):
        load_torch(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused_and_not_run(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol))
    with pytest.raises(UserError, match=r"a\.pkl: "):
        load_torch(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()


def test_only_what_is_allowed_gets_in(tmp_path):
    torch.save({"args": argparse.Namespace(seed=1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        load_torch(tmp_path / "a.pt")
    assert load_torch(tmp_path / "a.pt", allow=[argparse.Namespace])["args"].seed == 1
    with pytest.raises(UserError, match=r"argparse\.Namespace"):  # the permission ends with the call
        load_torch(tmp_path / "a.pt")


@pytest.mark.fault(
    "a checkpoint of weights is truncated",
    stage="every loader",
    outcome="one line that names the file",
    status="2",
    lost="nothing",
)
@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_one_sentence(tmp_path, zip_format, share):
    torch.save({"weight": torch.randn(1000)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"a\.pt: is not a PyTorch checkpoint, or a damaged or truncated one$"):
        load_torch(tmp_path / "a.pt")


def test_other_kinds_of_files(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("version https://example.org/lfs\n")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("folder", "missing"):
        with pytest.raises(UserError, match=f"{name}: cannot be read .*expected a PyTorch checkpoint$"):
            load_torch(tmp_path / name)
    for name in ("text", "array.npy"):
        with pytest.raises(UserError, match=f"{name}: is not a PyTorch checkpoint"):
            load_torch(tmp_path / name)


def test_a_shards_column_of_pickles_is_refused_and_not_run(tmp_path):
    """MDS has an encoding that unpickles; an index from an untrusted source may name it."""
    import hashlib
    import json

    from streaming import MDSWriter
    from training_parts import write_shards

    from digit_ds.data.shards import iterate

    shards = write_shards(tmp_path / "shards", images=2, views=1)
    with MDSWriter(columns={"discriminative": "bytes"}, out=str(tmp_path / "pkl"), hashes=["sha256"]) as writer:
        writer.write({"discriminative": pickle.dumps(Touch(tmp_path / "ran"))})
    (shards / "shard.00000.mds").write_bytes((tmp_path / "pkl" / "shard.00000.mds").read_bytes())
    index = (tmp_path / "pkl" / "index.json").read_bytes().replace(b'"bytes"]', b'"pkl"]')
    (shards / "index.json").write_bytes(index)
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"index_sha256": hashlib.sha256(index).hexdigest()}))
    with pytest.raises(UserError, match=r"index\.json has a column 'discriminative' of 'pkl', expected token shards"):
        list(iterate(shards))
    assert not (tmp_path / "ran").exists()
