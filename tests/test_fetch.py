"""Published weights in one command, from a hub on 127.0.0.1 by the real clients."""

import io
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import from_official
from hub_server import Hub, serving

from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.model.released import WEIGHTS, read_model
from digit_ds.publishing import fetch as fetching
from digit_ds.publishing.rows import find_checkpoint
from digit_ds.publishing.settings import FetchSettings
from digit_ds.tokenizer.codebook import save_codebook

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
PRIOR = "outputs/base_8k_stage1/checkpoints/checkpoint_last.pt"
DECODER = "outputs/base_8k_stage2_400epoch/checkpoints/checkpoint_last.pt"
CODEBOOK = "data/dinov2_base_short_224_l3/km_8k.npy"
ENCODER = "dinov2_vitb14_reg4_pretrain.pth"
LAUNCH = (
    "import os, digit_ds.publishing.rows as rows; row = rows.ROWS['base']; "
    "rows.ROWS['base'] = row._replace(encoder=os.environ['META'] + '/' + row.encoder.split('/')[-1]); "
    "from digit_ds.cli import main; main()"
)
"""The command with a server of this machine in Meta's place."""


def published() -> dict[str, bytes]:
    """Small models in the published layout, under the documented names; the prior with an optimizer's state."""
    prior = torch.load(GOLDEN / "stage1_uncond_postnorm" / "checkpoint_last.pt", weights_only=True)
    prior["last_optimizer_state"] = {"exp_avg": torch.arange(3 << 21, dtype=torch.float32)}  # 25 MB
    stream = io.BytesIO()
    torch.save(prior, stream)
    array = io.BytesIO()
    np.save(array, prior["model"]["centroids"].T.numpy())
    decoder = (GOLDEN / "stage2_ar" / "checkpoint_last.pt").read_bytes()
    return {"README.md": b"DiGIT", CODEBOOK: array.getvalue(), PRIOR: stream.getvalue(), DECODER: decoder}


FILES = published()
META = (GOLDEN / "dinov2" / "dinov2_reg4_tiny.pth").read_bytes()


@pytest.fixture
def hub():
    with serving() as hub:
        hub.files["DAMO-NLP-SG/DiGIT"] = dict(FILES)
        hub.plain[f"/{ENCODER}"] = META
        yield hub


def start(hub: Hub, home: Path, *words: str, limit: int | None = None, **variables: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.address, "HF_HOME": str(home / "hf"), **variables}
    environment |= {"META": hub.address, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, "fetch", *words],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def fetch(hub: Hub, home: Path, *words: str, **options) -> tuple[int, str, str]:
    process = start(hub, home, *words, **options)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def refusal(hub: Hub, home: Path, *words: str, **options) -> str:
    """The one line of a run that is refused. Progress bars end with a return, not with a line."""
    status, _, errors = fetch(hub, home, *words, **options)
    line = errors[errors.rindex("error: ") :]
    assert status == 2 and line.count("\n") == 1 and "Traceback" not in errors and "Warning" not in errors, errors
    return line.strip()


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_one_command_leads_to_pictures(hub, tmp_path):
    status, out, errors = fetch(hub, tmp_path, "base", HF_TOKEN="hf_good")
    assert status == 0, errors
    assert hub.asked("GET", PRIOR)[0]["Authorization"] == "Bearer hf_good"
    weights = tmp_path / "weights"
    whole = {"base_prior", "base_decoder", "km_8k.npy", ENCODER, "vqgan_of_base_decoder.ckpt"}
    assert visible(weights) == whole and not (weights / ".downloads").exists()
    assert (weights / "km_8k.npy").read_bytes() == FILES[CODEBOOK] and (weights / ENCODER).read_bytes() == META
    from_official(GOLDEN / "stage1_uncond_postnorm" / "checkpoint_last.pt", tmp_path / "expected")
    assert sha256(weights / "base_prior" / WEIGHTS) == sha256(tmp_path / "expected" / WEIGHTS)

    line = out.strip().splitlines()[-1]  # tests/test_documented_commands.py runs it
    assert line.startswith("digit-ds sample") and "--top-k 200 --decoder-top-p 0.8" in line

    before = len(hub.requests)
    status, again, _ = fetch(hub, tmp_path, "base")
    assert status == 0 and again.strip().splitlines()[-1] == line
    assert len(hub.requests) == before  # what is there is not asked for


@pytest.mark.fault(
    "kill -9 in the middle of a download",
    stage="fetch",
    outcome="the same call continues within the file",
    status="-",
    lost="nothing but the last few MB",
)
def test_killed_in_the_middle_it_continues_there(hub, tmp_path):
    hub.stall = 22 << 20
    process = start(hub, tmp_path, "base")
    assert hub.stalled.wait(60)
    (partial,) = wait_for(lambda: list((tmp_path / "weights" / ".downloads").rglob("*.incomplete")))
    wait_for(lambda: partial.stat().st_size >= 10 << 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert visible(tmp_path / "weights") == {"km_8k.npy"}
    hub.stall = None
    hub.released.set()
    status, _, errors = fetch(hub, tmp_path, "base")
    assert status == 0, errors
    assert any(int(asked.get("Range", "bytes=0-")[6:-1]) >= 10 << 20 for asked in hub.asked("GET", PRIOR))
    assert (tmp_path / "weights" / "base_prior" / "config.json").exists()


def wait_for(condition, seconds: float = 30):
    import time

    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.mark.fault(
    "a downloaded file has another SHA-256 than the hub states",
    stage="fetch",
    outcome="one line; the file is removed and the same call fetches it again",
    status="2",
    lost="that file",
)
def test_a_wrong_hash_is_found_and_the_file_removed(hub, tmp_path):
    hub.claimed[CODEBOOK] = "a" * 64
    line = refusal(hub, tmp_path, "base")
    assert f"{CODEBOOK}: is damaged" in line and f"expected {'a' * 64}" in line
    assert visible(tmp_path / "weights") == set()
    assert not list((tmp_path / "weights").rglob("*.npy"))
    del hub.claimed[CODEBOOK]
    hub.files["DAMO-NLP-SG/DiGIT"].pop(PRIOR)
    assert "none of its checkpoints may be the base prior by name" in refusal(hub, tmp_path, "base")
    assert visible(tmp_path / "weights") == {"km_8k.npy"}


@pytest.mark.fault(
    "no network, HF_HUB_OFFLINE is set, or the repository wants a token",
    stage="fetch",
    outcome="one line",
    status="2",
    lost="nothing",
)
def test_no_network_in_one_line(hub, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert f"no connection to {nowhere}" in refusal(hub, tmp_path, "base", HF_ENDPOINT=nowhere)
    assert "HF_HUB_OFFLINE is set" in refusal(hub, tmp_path, "base", HF_HUB_OFFLINE="1")
    assert not (tmp_path / "weights").exists() and hub.requests == []
    hub.closed.add("DAMO-NLP-SG/DiGIT")
    assert "expected a repository that HF_TOKEN may use" in refusal(hub, tmp_path, "base")


@pytest.mark.fault(
    "the disk is full, or a limit on file sizes is met",
    stage="fetch",
    outcome="one line; with room again the same call continues within the file",
    status="2",
    lost="nothing",
)
def test_a_full_disk_leaves_nothing_half_written(hub, tmp_path):
    line = refusal(hub, tmp_path, "base", limit=12 << 20)
    assert ".downloads" in line and "File too large" in line
    assert visible(tmp_path / "weights") == {"km_8k.npy"}
    assert fetch(hub, tmp_path, "base")[0] == 0  # goes on with what had come
    assert any("Range" in asked for asked in hub.asked("GET", PRIOR))


def test_copied_files_need_no_network(hub, tmp_path):
    copies = tmp_path / "copies"
    for name, content in FILES.items():
        (copies / name).parent.mkdir(parents=True, exist_ok=True)
        (copies / name).write_bytes(content)
    line = refusal(hub, tmp_path, "base", "--from", "copies", HF_HUB_OFFLINE="1")
    assert f"copies: has no {ENCODER}, expected the file of http" in line
    (copies / ENCODER).write_bytes(META[:-100])
    assert "copies" in refusal(hub, tmp_path, "base", "--from", "copies")
    assert not (tmp_path / "weights" / ENCODER).exists()
    (copies / ENCODER).write_bytes(META)
    status, out, errors = fetch(hub, tmp_path, "base", "--from", "copies", HF_HUB_OFFLINE="1")
    assert status == 0 and "digit-ds sample" in out, errors
    assert hub.requests == [] and (copies / PRIOR).exists()


def test_a_prior_given_as_decoder_is_refused_as_such(hub, tmp_path):
    """And not by the VQGAN that it does not carry."""
    for _ in range(2):  # what was converted is removed
        line = refusal(hub, tmp_path, "base", "--decoder", PRIOR)
        assert f"{PRIOR}: has kind prior, expected ar or nar as decoder (--decoder)" in line
    assert visible(tmp_path / "weights") == {"km_8k.npy", "base_prior"}
    from_official(GOLDEN / "stage1_uncond_postnorm" / "checkpoint_last.pt", tmp_path / "weights" / "base_decoder")
    line = refusal(hub, tmp_path, "base")
    assert "weights/base_decoder: has kind prior, expected ar or nar as decoder (--decoder)" in line


def test_a_missing_folder_of_copies_is_refused_first(hub, tmp_path):
    """Even where what is asked for first lies there already."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "km_8k.npy").write_bytes(FILES[CODEBOOK])
    status, out, errors = fetch(hub, tmp_path, "base", "--from", "nowhere")
    assert status == 2 and out == "" and "nowhere" in errors.splitlines()[-1]


def test_what_the_hubs_client_noted_of_copied_files_is_compared(hub, tmp_path):
    note = tmp_path / "copies" / ".cache" / "huggingface" / "download" / f"{CODEBOOK}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{'b' * 64}\n1.0\n")
    (tmp_path / "copies" / CODEBOOK).parent.mkdir(parents=True)
    (tmp_path / "copies" / CODEBOOK).write_bytes(FILES[CODEBOOK])
    assert f"expected {'b' * 64}" in refusal(hub, tmp_path, "base", "--from", "copies")


def test_without_a_vqgan_the_drive_is_named(hub, tmp_path):
    weights = tmp_path / "weights"
    from_official(GOLDEN / "stage1_uncond_postnorm" / "checkpoint_last.pt", weights / "base_prior")
    from_official(GOLDEN / "stage2_ar" / "checkpoint_last.pt", weights / "base_decoder", carry=False)
    (weights / ENCODER).write_bytes(META)
    centroids = torch.from_numpy(np.load(io.BytesIO(FILES[CODEBOOK])))
    save_codebook(weights / "km_8k.npy", centroids, {})
    line = refusal(hub, tmp_path, "base")
    assert "weights/vqgan_jax_strongaug.ckpt: is missing" in line and "https://drive.google.com/" in line
    shutil.copy(GOLDEN / "vqgan" / "vqgan.ckpt", weights / "vqgan_jax_strongaug.ckpt")  # another VQGAN than MAGE's
    assert "vqgan_jax_strongaug.ckpt, read with MAGE" in refusal(hub, tmp_path, "base")


def test_which_checkpoint_is_meant():
    names = [PRIOR, DECODER, "base_8k_stage1_cls/checkpoint_last.pt", "large_stage1.pt", "large_stage1_cls.pt"]
    assert find_checkpoint(names, "base", "prior", None, "repo") == PRIOR
    assert find_checkpoint(names, "base", "decoder", None, "repo") == DECODER
    assert find_checkpoint(names, "large", "prior", "large_stage1_cls.pt", "repo") == "large_stage1_cls.pt"
    with pytest.raises(UserError, match=r"2 of its checkpoints may be the large prior.*--prior, one of large_stage1"):
        find_checkpoint(names, "large", "prior", None, "repo")
    with pytest.raises(UserError, match=r"repo: has no checkpoint other.pt, expected one of base_8k_stage1_cls"):
        find_checkpoint(names, "large", "prior", "other.pt", "repo")


def test_trial_networks_are_written_without_a_download(tmp_path, capsys):
    folder = tmp_path / "weights"

    def fetch_trial(**options) -> dict[str, str]:
        fetching.fetch(FetchSettings(size="trial", dir=str(folder), **options))
        return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}

    first = fetch_trial()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"digit-ds sample --prior {folder}/base_prior --decoder")
    parts = read_model(folder / "base_decoder").provenance
    assert parts["vqgan_sha256"] == first["vqgan_of_base_decoder.ckpt"]
    assert parts["codebook_sha256"] == first["km_8k.npy"] and parts["encoder_sha256"] == first[ENCODER]
    (folder / "km_8k.npy").write_bytes(b"half")  # of a killed call
    assert fetch_trial() == first
    with pytest.raises(UserError, match=r"^--prior x\.pt: is given with trial, expected base or large with it$"):
        fetch_trial(prior="x.pt")
    with pytest.raises(UserError, match=r"weights: holds the files of fetch trial, expected another folder"):
        fetching.fetch(FetchSettings(size="base", dir=str(folder), source=str(tmp_path)))
    assert {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()} == first
    (folder / "trial.json").unlink()
    with pytest.raises(UserError, match=r"weights: holds base_8k_stage1_cls, expected a new folder for the trial"):
        fetch_trial()
