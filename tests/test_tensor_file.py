"""Safetensors files written piece by piece are those of safetensors itself."""

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from digit_ds.errors import UserError
from digit_ds.model.tensor_file import _DTYPES, Content, holds, whole, write_tensors


def pieces(tensor: torch.Tensor, size: int) -> Content:
    flat = tensor.reshape(-1)
    return Content(
        tensor.dtype, tuple(tensor.shape), lambda: (flat[at : at + size] for at in range(0, len(flat), size))
    )


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    """All dtypes, shapes without dimensions and without elements, names that JSON escapes, tensors that are views."""
    torch.manual_seed(0)
    tensors = {f"layers.{number}.{kind}": torch.randn(7, 5).to(kind) for number, kind in enumerate(_DTYPES)}
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        'quote" back\\slash \x01\t\x7f': torch.ones(3),
        "größe ☃": torch.ones(2, 1, dtype=torch.bfloat16),
        "transposed": torch.randn(4, 6).T,
        "z": torch.zeros(1, dtype=torch.uint8),
    }
    for count in range(len(tensors) + 1):  # headers of all lengths modulo eight
        chosen = dict(list(tensors.items())[:count])
        save_file({name: value.contiguous() for name, value in chosen.items()}, tmp_path / "theirs", {"format": "pt"})
        contents = {name: pieces(value, 4) if count % 2 else whole(value) for name, value in chosen.items()}
        write_tensors(tmp_path / "ours", contents)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert holds(tmp_path / "theirs", contents)
    assert torch.equal(load_file(tmp_path / "ours")["transposed"], tensors["transposed"])
    assert not holds(tmp_path / "ours", contents | {"z": whole(torch.ones(1, dtype=torch.uint8))})
    (tmp_path / "longer").write_bytes((tmp_path / "ours").read_bytes() + b" ")
    assert not holds(tmp_path / "longer", contents) and not holds(tmp_path / "nowhere", contents)


def test_pieces_are_not_kept(tmp_path):
    """While one is read the one before it may still be held, none of those before."""
    made, alive = [], []

    def read():
        for number in range(5):
            alive.append(sum(piece() is not None for piece in made))
            piece = torch.full((3,), number)
            made.append(weakref.ref(piece))
            yield piece
            del piece

    write_tensors(tmp_path / "model", {name: Content(torch.int64, (15,), read) for name in "ab"})
    assert len(alive) == 10 and max(alive) <= 1


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model: cannot hold w, which is torch\.complex128, expected torch\.bool, "):
        write_tensors(tmp_path / "model", {"w": whole(torch.zeros(1, dtype=torch.complex128))})
    assert not list(tmp_path.iterdir())
